"""The names that `import vidaccel` gives, as dir() and a shell's completion show them."""

import json
import subprocess
import sys
from rlcompleter import Completer

import vidaccel


def test_dir_and_completion_show_every_public_name():
    assert set(vidaccel.__all__) <= set(dir(vidaccel))
    complete = Completer({"vidaccel": vidaccel})
    shown = {complete.complete("vidaccel.accel", state) for state in range(2)}
    assert any(name and name.startswith("vidaccel.accelerate") for name in shown)


def test_dir_imports_nothing():
    code = "import vidaccel, sys, json; dir(vidaccel); print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
