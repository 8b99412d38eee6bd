"""The account as text: three lines at a run's start, a table for `plan=true`, and what to change where something does not fit."""

from typing import Any

from dev2pro.planning.account import Account, Parts
from dev2pro.training import stop_time
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.stop_time import StopTime

SPARE = 0.08  # of a card that should stay free for what a plan does not see: fragments between tensors, workspaces of kernels
SHOWN = 1e7  # bytes of a part that is worth naming


def summary(account: Account, config: Any, card: float) -> list[str]:
    """Memory, disk and time, a line each; `card`: bytes of one GPU, 0 if unknown."""
    phase, peak = account.peak
    of_card = f" of {_gb(card)}" if card else ""
    return [
        f"plan: GPU memory up to {_gb(peak)}{of_card} GB, in {phase}: {_named(account.gpu[phase])}",
        f"plan: {_host(account)}, disk {_gb(sum(account.disk.values()))} GB{_checkpoint(account, config)}",
        f"plan: {_time(account, config) or _flops(account)}",
    ]


def table(account: Account, config: Any, card: float) -> str:
    """Every phase with its parts, then disk, FLOPs and time."""
    machines = f" on {account.machines} machines" if account.machines > 1 else ""
    lines = [f"{account.stage} on {account.ranks} GPU{'s' * (account.ranks > 1)}{machines}, in GB; one GPU has {_gb(card) if card else '?'}", ""]
    lines += _phases("GPU", account.gpu)
    if account.staying:
        lines.append(f"{'':14}T5 and CLIP are freed before training up to {account.captions:,} captions; with more, add {_gb(account.staying)}")
    lines += ["", *_phases("host memory, a machine", account.host), "", "disk"]
    lines += [f"  {name:28}{bytes / 1e9:10.3f}" for name, bytes in account.disk.items()]
    lines += ["", f"FLOPs         {_flops(account)}"]
    if account.state:
        lines.append(f"checkpoint    {_checkpoint(account, config).removeprefix('; ')}")
    lines.append(f"time          {_time(account, config) or 'set hardware.tflops to what one GPU reaches, and hardware.price to that of its hour'}")
    return "\n".join(lines)


def misfits(account: Account, config: Any, card: float) -> list[str]:
    """A sentence for each limit that is exceeded, and what to change."""
    hardware: HardwareConfig = config.hardware
    (phase, peak), (moment, host), disk = account.peak, account.host_peak, sum(account.disk.values())
    found = []
    if card and peak > card:
        cures = "; ".join(advice(account, phase, config))
        found.append(f"{account.stage} needs {_gb(peak)} GB of a GPU that has {_gb(card)}, in {phase}: {_named(account.gpu[phase])}. {cures}.")
    if hardware.host_gb and host > hardware.host_gb * 1e9:
        found.append(
            f"{account.stage} needs {_gb(host)} GB of host memory, and hardware.host_gb is {hardware.host_gb:g}, in {moment}: "
            f"{_named(account.host[moment])}. Take a machine with more, or lower hardware.encodings_gb."
        )
    if hardware.disk_gb and disk > hardware.disk_gb * 1e9:
        found.append(
            f"{account.stage} needs {_gb(disk)} GB of disk, and hardware.disk_gb is {hardware.disk_gb:g}: {_named(account.disk)}. "
            "Choose an out= with more room, or lower checkpoint.keep."
        )
    return found


def advice(account: Account, phase: str, config: Any) -> list[str]:
    """What makes the largest parts of a phase smaller, in the order of their bytes."""
    hardware, stage, parts = config.hardware, account.stage, account.gpu[phase]
    alone = account.ranks == 1
    training, full = stage in ("recover", "lora", "distill"), stage in ("recover", "distill")
    cures = {
        "weights": ["set hardware.int8_base=true"] * (stage == "lora" and not hardware.int8_base)
        + ["set hardware.dtype=bfloat16"] * (training and hardware.dtype != "bfloat16" and not hardware.shard)
        + ["set hardware.inference_dtype=bfloat16"] * (stage in ("evaluate", "tune") and hardware.inference.itemsize > 2)
        + ["spread it over more GPUs with hardware.shard=true (dev2pro.ranks)"] * full,
        "moments": ["set optim.name=adamw_8bit"] * (training and hardware.dtype == "bfloat16" and config.optim.name == "adamw"),
        "gradients": ["set hardware.step_in_backward=true"] * (full and alone and not hardware.step_in_backward),
        "average": ["set hardware.ema_offload=true"] * (full and alone and not hardware.ema_offload),
        "T5 and CLIP": ["set hardware.encoder_dtype=bfloat16"] * (hardware.encoders.itemsize > 2)
        + ["set hardware.int8_encoders=true"] * (not hardware.int8_encoders),
        "activations": ["set hardware.gradient_checkpointing=true"] * (training and not hardware.gradient_checkpointing)
        + ["lower hardware.micro_batch"] * (training and hardware.micro_batch > 1)
        + ["lower sampling.batch"] * (stage in ("evaluate", "tune") and config.sampling.batch > 1),
    }
    ordered = sorted(parts, key=lambda part: -parts[part])
    return [cure for part in ordered for cure in cures.get(part, [])] or ["take a larger card, or lower the resolution"]


def _gb(bytes: float) -> str:
    return f"{bytes / 1e9:.3g}" if bytes < 1e11 else f"{bytes / 1e9:.0f}"


def _named(parts: Parts) -> str:
    shown = sorted(((bytes, name) for name, bytes in parts.items() if bytes >= SHOWN), reverse=True)
    return ", ".join(f"{name} {_gb(bytes)}" for bytes, name in shown)


def _phases(title: str, phases: dict[str, Parts]) -> list[str]:
    return [title, *(f"  {phase:16}{sum(parts.values()) / 1e9:8.2f}   {_named(parts)}" for phase, parts in phases.items())]


def _host(account: Account) -> str:
    phase, peak = account.host_peak
    return f"host memory up to {_gb(peak)} GB a machine, in {phase}"


def _flops(account: Account) -> str:
    return ", ".join(f"{what} {flops / 1e12:.3g} TFLOP" for what, flops in account.flops.items()) + " a sample"


def checkpoint_seconds(account: Account, config: Any) -> float:
    """From a signal to a whole checkpoint, at the speed that a run assumes before it has measured one."""
    return StopTime(round(account.state), None).needed + 2 * (_step_seconds(account, config) or 0)


def _checkpoint(account: Account, config: Any) -> str:
    if not account.state:
        return ""
    seconds, grace = checkpoint_seconds(account, config), config.checkpoint.grace
    if grace is None:
        verdict = "which a scheduler must grant after SIGTERM"
    else:
        verdict = f"within checkpoint.grace={grace:g}" if seconds <= grace else f"MORE THAN checkpoint.grace={grace:g}: set it to null, or higher"
    return f"; a stop with a checkpoint of {_gb(account.state)} GB takes {seconds:.0f} s at {stop_time.RATE / 1e9:g} GB/s, {verdict}"


def _rate(config: Any) -> float:
    return config.hardware.tflops * 1e12


def _step_seconds(account: Account, config: Any) -> float | None:
    return account.flops["a step"] * config.batch / account.ranks / _rate(config) if _rate(config) and "a step" in account.flops else None


def _time(account: Account, config: Any) -> str:
    """Seconds a step, hours, cost; empty where hardware.tflops is not given. Encodings that are stored or kept are not made again."""
    if not _rate(config):
        return ""
    if (step := _step_seconds(account, config)) is None:
        seconds = account.flops["a picture"] / _rate(config)
        return f"{seconds:.3g} s a picture on one GPU at {config.hardware.tflops:g} TFLOP/s"
    probes = -(-config.steps // config.probe.every) + 1
    forwards = 2 * config.probe.samples * config.probe.bins + 2 * config.preview.pictures * config.preview.steps
    seconds = config.steps * step + probes * forwards * account.flops["measuring"] / _rate(config)
    hours = seconds / 3600
    cost = f", {hours * account.ranks * config.hardware.price:,.0f} at {config.hardware.price:g} a GPU and hour" if config.hardware.price else ""
    return (
        f"{step:.3g} s a step, {hours:.3g} h with {probes} measurements, at {config.hardware.tflops:g} TFLOP/s a GPU{cost}; "
        "pictures encoded as they come are not in it"
    )
