"""The command `vidaccel policies`: the policies that a user's own runs have left."""

import argparse
from pathlib import Path
from typing import Any

from vidaccel.cli.options import add_command
from vidaccel.cli.output import check_writable, print_written
from vidaccel.errors import PolicyError


def add_policies(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "policies", "list, show, add, export or delete the policies of your own runs"
    )
    parser.set_defaults(run=_list)
    actions = parser.add_subparsers(metavar="ACTION")
    for name, text, run in (
        ("list", "what was learned so far", _list),
        ("show", "what one of them says", _show),
        ("add", "keep a policy file among them, for auto to find", _add),
        ("export", "copy one of them to a file", _export),
        ("delete", "delete one of them, or all that were learned", _delete),
    ):
        action = add_command(actions, name, text)
        action.set_defaults(run=run)
        if name == "add":
            action.add_argument("file", type=Path, help="a policy file, .json")
        elif name == "delete":
            action.add_argument("name", nargs="?", help="its name, or the start of it")
            action.add_argument("--all", action="store_true", help="all that were learned")
        elif name != "list":
            action.add_argument("name", help="its name, or the start of it")
        if name == "export":
            action.add_argument("out", type=Path, help="the file, .json")


def _list(arguments: argparse.Namespace) -> None:
    from vidaccel.plans import user_folder
    from vidaccel.plans.policy import CachePolicy

    rows = []
    for file in user_folder.files():
        try:
            policy = CachePolicy.load(file)
        except PolicyError as error:
            rows.append(f"{file.name}\n  cannot be used: {error}")
            continue
        run = [policy.provenance, policy.scheduler.name or ""]
        run += [] if policy.latents is None else ["x".join(map(str, policy.latents)) + " latents"]
        scale = policy.guidance.scale
        run += [] if scale is None else [f"guidance {scale:g}"]
        run += [f"with {', '.join(policy.adapters)}"] if policy.adapters else []
        clips = len(user_folder.measured_clips(policy))
        run += [f"measured on {clips} clip{'s' * (clips > 1)}"] if clips else []
        run += ["validated"] if policy.validation else []
        rows.append(f"{file.name}\n  {', '.join(filter(None, run))}")
    print(f"{user_folder.folder()}: {len(rows)} policies" if rows else _NOTHING)
    for row in rows:
        print(row)


_NOTHING = (
    'no policies yet: accelerate(pipe, policy="learn") and vidaccel generate --policy learn keep '
    "what they learn"
)


def _show(arguments: argparse.Namespace) -> None:
    from vidaccel.plans import user_folder
    from vidaccel.plans.policy import CachePolicy

    policy = CachePolicy.load(_find(arguments.name))
    print(user_folder.with_measured(policy).table())
    clips = user_folder.measured_clips(policy)
    if not clips:
        return
    print("\nbeside plain clips, the newest first")
    print("budget  predicted       PSNR   SSIM  speedup  seed  prompt")
    for clip in clips:
        predicted = policy.predicted_psnr(clip.budget)
        expected = "-" if predicted is None else f"{predicted:.1f} dB"
        ssim = "-" if clip.ssim is None else f"{clip.ssim:.3f}"
        print(
            f"{clip.budget:6d}  {expected:>9}  {clip.psnr:6.1f} dB  {ssim:>5}  "
            f"{clip.speedup:6.2f}x  {clip.seed:4d}  {clip.prompt[:8]}"
        )


def _add(arguments: argparse.Namespace) -> None:
    from vidaccel.plans import user_folder
    from vidaccel.plans.policy import CachePolicy

    print_written([user_folder.save(CachePolicy.load(arguments.file))])


def _export(arguments: argparse.Namespace) -> None:
    from vidaccel.plans import user_folder
    from vidaccel.plans.policy import CachePolicy

    out: Path = arguments.out
    if out.suffix != ".json":
        raise PolicyError(f"expected a file name that ends in .json, found {out}")
    policy = user_folder.with_measured(CachePolicy.load(_find(arguments.name)))
    check_writable(out)
    policy.save(out)
    print_written([out])


def _delete(arguments: argparse.Namespace) -> None:
    from vidaccel.plans import user_folder
    from vidaccel.plans.policy import CachePolicy

    if arguments.all == (arguments.name is not None):
        raise PolicyError("say which policy to delete by its name, or --all for those learned")
    if arguments.name is not None:
        chosen = [_find(arguments.name)]
    else:
        chosen = []
        for file in user_folder.files():
            try:
                learned = CachePolicy.load(file).provenance == "learned"
            except PolicyError:
                continue  # not known to be ours
            chosen += [file] if learned else []
    for file in chosen:
        user_folder.delete(file)
        print(f"deleted {file}")
    if not chosen:
        print("nothing to delete")


def _find(name: str) -> Path:
    """Return the one file of the folder whose name begins so.

    Raises:
        PolicyError: there is none, or there are several.
    """
    from vidaccel.plans import user_folder

    found = [file for file in user_folder.files() if file.name.startswith(name)]
    exact = [file for file in found if name in (file.name, file.stem)]
    if len(exact or found) != 1:
        there = f"{len(found)} of that name" if found else "none of that name"
        raise PolicyError(f"policies: found {there}, {name!r}: vidaccel policies lists them")
    return (exact or found)[0]
