"""What `accelerate launch` asks of a run, read before anything is loaded.

Accelerate hands its configuration over in the environment. phreg trains one copy of the model per process,
which exchange gradients (DDP), or shards the weights that train (FSDP 2). Whatever would change that is
refused here: accelerate would otherwise apply it without a word to a loop that was not made for it.

    accelerate config ──environment──► check_launch ──► precision ──► Accelerator
"""

import logging
import os
from collections.abc import Mapping
from typing import Literal, cast

from phreg.config import DistillConfig
from phreg.errors import PhregError

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]

ENVIRONMENT = os.environ
"""Where accelerate leaves its configuration."""

SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "it wraps model and optimizer in an engine of its own, past phreg's loss, checkpoints and LoRA",
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron-LM",
        "it needs models written for it, and phreg trains models of transformers, timm and open_clip",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism config (tensor, context or sequence parallel)",
        "registers and read-outs are hooks around whole blocks",
    ),
}
"""Switches of accelerate that are refused: what each turns on, and why not."""

ADVICE = (
    "run `accelerate launch --multi_gpu` without it, or --use_fsdp --fsdp_version 2, which shards what "
    "trains. For less memory: unlock.lora, checkpoint_activations, optim.micro_batch, frozen_dtype = bf16"
)


def check_launch(config: DistillConfig, environment: Mapping[str, str] = ENVIRONMENT) -> None:
    """Checks that phreg can run as it was launched.

    Args:
        config: The run's settings.
        environment: What accelerate left.

    Raises:
        PhregError: Accelerate is configured for something that phreg does not support.
    """
    found = [
        f"{name}, which phreg does not support: {reason}; {ADVICE}"
        for switch, (name, reason) in SWITCHES.items()
        if _is_on(environment.get(switch))
    ]
    if shards_weights(environment):
        found += _unsupported_fsdp(environment)
        # transformers would load weights in the first process alone, for accelerate to hand on.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        found.append(
            f"dynamo_backend {backend.lower()}, which compiles the whole model past phreg's hooks; "
            "set it to no, and use --compile, which compiles the blocks"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        found.append(
            f"gradient_accumulation_steps {steps}, which would divide the loss a second time; "
            f"set it to 1, and use --optim.accumulate {steps}"
        )
    if found:
        raise PhregError("accelerate is configured for " + "\nand for ".join(found))
    launched_precision(config, environment)


def shards_weights(environment: Mapping[str, str] = ENVIRONMENT) -> bool:
    """Whether accelerate is configured for FSDP."""
    return _is_on(environment.get("ACCELERATE_USE_FSDP"))


def reshards(environment: Mapping[str, str] = ENVIRONMENT) -> bool:
    """Whether FSDP drops gathered weights after the forward pass, as fsdp_reshard_after_forward says."""
    return environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"


def _unsupported_fsdp(environment: Mapping[str, str]) -> list[str]:
    found = []
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        found.append(f"FSDP {version}, and phreg supports FSDP 2; set fsdp_version: 2 (--fsdp_version 2)")
    if _is_on(environment.get("FSDP_OFFLOAD_PARAMS")):
        found.append("fsdp_offload_params, which phreg does not support; set it to false")
    if _is_on(environment.get("FSDP_ACTIVATION_CHECKPOINTING")):
        found.append("fsdp_activation_checkpointing; set it to false, and use --checkpoint-activations")
    return found


def launched_precision(
    config: DistillConfig, environment: Mapping[str, str] = ENVIRONMENT
) -> Precision | None:
    """Returns the precision that was asked for: by --precision, or else by accelerate's mixed_precision.

    Accelerate sets `no` wherever nobody chose, so `no` chooses nothing.

    Returns:
        The precision; None where neither asks for one.

    Raises:
        PhregError: Accelerate alone decides, and asks for a precision that phreg does not train in.
    """
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.precision is not None:
        if launched not in ("no", config.precision):
            logger.warning(
                "accelerate asks for mixed_precision %s and --precision for %s: --precision decides",
                launched, config.precision,
            )  # fmt: skip
        return config.precision
    if launched == "fp16":
        raise PhregError(
            "accelerate asks for mixed_precision fp16, and phreg trains in fp32 or bf16: the gradients of "
            "fp16 underflow unless they are scaled, which phreg does not do. Use --precision bf16 where the "
            "GPU computes in it (compute capability 8.0 and later), else --precision fp32"
        )
    if launched not in ("no", "bf16"):
        raise PhregError(
            f"accelerate asks for mixed_precision {launched}, and phreg trains in fp32 or bf16; "
            "use --precision fp32 or --precision bf16"
        )
    return None if launched == "no" else cast(Precision, launched)


def _is_on(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on")
