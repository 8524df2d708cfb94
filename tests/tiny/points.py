"""Points of quality against speed, made up."""

from typing import Any

from vidaccel.bench.curves import Point


def point(method: str, speedup: float, psnr: float, **others: Any) -> Point:
    """A point with a worst prompt of 2 dB less, and little else."""
    values: dict[str, Any] = {
        "psnr": psnr,
        "worst_psnr": psnr - 2,
        "ssim": psnr / 100,
        "worst_ssim": 0.1,
        "flicker": 0.0,
        "seconds": 6 / speedup,
        "cpu_seconds": 6 / speedup,
        "wall_speedup": speedup,
        "cpu_speedup": speedup,
        "blocks_share": 1 / speedup,
        "setting": {},
    }
    nothing = ("lpips", "worst_lpips", "adherence", "steps_share", "density")
    values |= dict.fromkeys((*nothing, "every_psnr", "every_ssim", "every_lpips"))
    return Point(method=method, speedup=speedup, **(values | others))
