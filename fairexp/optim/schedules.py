"""Learning-rate schedules: pure functions from an optimizer step to a factor on the base learning rate.

`step` counts from 0. The factor of the first step is above 0, warm-up is linear and ends at 1, the last step
(max_steps - 1) has the final factor, and so does every step after it. `warmup` and `decay` are an int of steps, or a
float in [0, 1): a fraction of `max_steps`.
"""

import math


def cosine(step: int, *, max_steps: int, warmup: int | float, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final` after the warm-up (Loshchilov & Hutter 2017, arXiv:1608.03983; no restarts)."""
    warmup, _ = _resolve(max_steps, warmup, final=final)
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * _progress(step, warmup, max_steps))) / 2


def linear(step: int, *, max_steps: int, warmup: int | float, final: float = 0.0) -> float:
    """A straight line from 1 to `final` after the warm-up (as in BERT: Devlin et al. 2019, arXiv:1810.04805)."""
    warmup, _ = _resolve(max_steps, warmup, final=final)
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (1 - _progress(step, warmup, max_steps))


def constant(step: int, *, max_steps: int, warmup: int | float) -> float:
    """1 from the end of the warm-up on."""
    warmup, _ = _resolve(max_steps, warmup)
    return (step + 1) / warmup if step < warmup else 1.0


def wsd(step: int, *, max_steps: int, warmup: int | float, decay: int | float, final: float = 0.0) -> float:
    """Warm-up, stable, decay (MiniCPM: Hu et al. 2024, arXiv:2404.06395): 1, then `final` by the end of `decay`.

    The decay is a straight line (Hägele et al. 2024, arXiv:2405.18392), so that `final` may be 0; MiniCPM's is
    exponential. With an int `warmup`, no factor before the decay depends on `max_steps`: longer runs share those steps.
    """
    warmup, decay = _resolve(max_steps, warmup, decay, final)
    if step < warmup:
        return (step + 1) / warmup
    if step < max_steps - decay:
        return 1.0
    return final + (1 - final) * max(max_steps - 1 - step, 0) / max(decay, 1)


def _resolve(max_steps: int, warmup: int | float, decay: int | float = 0, final: float = 0.0) -> tuple[int, int]:
    """The warm-up and the decay in whole steps; ValueError says which setting is impossible."""
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: a schedule needs at least 1 step")
    if not 0 <= final <= 1:
        raise ValueError(f"final={final}: a factor on the base learning rate, from 0 to 1")
    for name, value in ("warmup", warmup), ("decay", decay):
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError(f"{name}={value}: steps (an int from 0) or a fraction of max_steps (a float below 1)")
    num_warmup, num_decay = (round(n * max_steps) if isinstance(n, float) else n for n in (warmup, decay))
    if num_warmup + num_decay > max_steps:
        asked = f"warmup={warmup} and decay={decay}" if decay else f"warmup={warmup}"
        raise ValueError(f"{asked}: {num_warmup + num_decay} steps, more than max_steps={max_steps}")
    return num_warmup, num_decay


def _progress(step: int, num_warmup: int, max_steps: int) -> float:
    """0 at the last step of the warm-up, or at step 0 without one; 1 at the last step of the run and after it."""
    peak = max(num_warmup - 1, 0)
    return min((step - peak) / max(max_steps - 1 - peak, 1), 1.0)
