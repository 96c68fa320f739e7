"""nnU-Net's networks, built from the plans by `dynamic-network-architectures`, never by importing what they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from wsitk.errors import ModelError
from wsitk.torchfile import TensorFile, checked_state
from wsitk.torchvision_guard import ensure_torchvision

__all__ = ["UNet", "architecture", "build_unet", "load_into"]

HOME = "dynamic_network_architectures.architectures."
KINDS = {
    f"{HOME}unet.PlainConvUNet": "PlainConvUNet",
    f"{HOME}unet.ResidualEncoderUNet": "ResidualEncoderUNet",
    f"{HOME}residual_unet.ResidualEncoderUNet": "ResidualEncoderUNet",  # as old plans are translated upstream
}

PARTS: Mapping[str, Mapping[str, Any]] = {
    "conv_op": {"Conv3d": nn.Conv3d},
    "norm_op": {"InstanceNorm3d": nn.InstanceNorm3d, "BatchNorm3d": nn.BatchNorm3d},
    "dropout_op": {"Dropout3d": nn.Dropout3d},
    "nonlin": {"LeakyReLU": nn.LeakyReLU, "ReLU": nn.ReLU},
}
"""What plans may name for each part; upstream imports whatever is written there."""

NUMBERS = frozenset(
    (
        *(
            "n_stages",
            "features_per_stage",
            "kernel_sizes",
            "strides",
            "n_conv_per_stage",
            "n_blocks_per_stage",
        ),
        *("n_conv_per_stage_decoder", "conv_bias", "norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs"),
        *("nonlin_first", "stem_channels", "bottleneck_channels"),
    )
)


@final
class UNet(nn.Module):
    """A plain or residual-encoder U-Net with upstream's names, and its last layer apart as `head`."""

    encoder: Any
    decoder: Any

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.encoder = unet.encoder
        self.decoder = unet.decoder

    @property
    def head(self) -> nn.Conv3d:
        """Return the point-wise convolution from features to logits."""
        head: nn.Conv3d = self.decoder.seg_layers[-1]
        return head

    def features(self, x: Tensor) -> Tensor:
        """Return (N, F, Z, Y, X), to which `head` is applied."""
        skips: list[Tensor] = self.encoder(x)
        x = skips[-1]
        coarser = reversed(skips[:-1])
        for up, stage, skip in zip(self.decoder.transpconvs, self.decoder.stages, coarser, strict=True):
            x = stage(torch.cat((up(x), skip), dim=1))
        return x

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.features(x))}


def architecture(configuration: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a configuration's class name and arguments, translating plans from before version 2.3.

    Raises KeyError for a configuration that says neither.
    """
    if "architecture" in configuration:
        described = configuration["architecture"]
        return str(described["network_class_name"]), dict(described["arch_kwargs"])
    name = str(configuration["UNet_class_name"])
    blocks = configuration["n_conv_per_stage_encoder"]
    first, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    return f"{HOME}unet.{name}", {
        "n_stages": len(blocks),
        "features_per_stage": [min(first * 2**k, most) for k in range(len(blocks))],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def build_unet(name: str, arguments: Mapping[str, Any], channels: int, outputs: int) -> UNet:
    """Return the network on the meta device: it has shapes, and takes no memory.

    Raises ModelError: WSI341 for a class, a part or an argument that is not one of nnU-Net's own, WSI342 if
    `dynamic-network-architectures` is not installed.
    """
    if name not in KINDS:
        raise _odd(f"network {name!r}", f"wanted {', '.join(sorted(set(KINDS.values())))}")
    chosen = {key: _argument(key, value) for key, value in arguments.items()}
    ensure_torchvision()  # its versions from 0.4 import timm
    try:
        from dynamic_network_architectures.architectures import unet
    except ImportError as error:
        raise ModelError(
            "WSI342", "nnU-Net's networks need dynamic-network-architectures; pip install 'wsitk[volumes]'"
        ) from error
    try:
        with torch.device("meta"):
            whole = getattr(unet, KINDS[name])(
                input_channels=channels, num_classes=outputs, deep_supervision=False, **chosen
            )
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _odd(f"network {name!r}", f"its arguments don't fit: {reason}") from error
    return UNet(whole)


def _argument(key: str, value: Any) -> Any:
    if key in NUMBERS:
        return value
    if key not in PARTS:
        raise _odd(f"the network's argument {key!r}", "unknown to nnU-Net's own networks")
    if value is None:
        return None
    home, _, part = str(value).rpartition(".")
    if part not in PARTS[key] or home.partition(".")[0] != "torch":
        raise _odd(f"{key} {value!r}", f"wanted {' or '.join(PARTS[key])} of torch.nn")
    return PARTS[key][part]


def load_into(network: nn.Module, file: TensorFile) -> nn.Module:
    """Fill a network on the meta device with the file's tensors, and return it in evaluation mode.

    One layer has several names there (``encoder.…``, ``decoder.encoder.…``, ``….all_modules.0…``); the first that
    the file has speaks for all. Raises ModelError as `checked_state` does.
    """
    own = network.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    leader = {name: first.setdefault(id(tensor), name) for name, tensor in own.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        found.setdefault(leader.get(name, name), tensor)
    state = checked_state(
        replace(file, tensors=found), {name: own[name] for name in dict.fromkeys(leader.values())}
    )
    network.load_state_dict({name: state[lead] for name, lead in leader.items()}, strict=True, assign=True)
    return network.eval()


def _odd(got: str, wanted: str) -> ModelError:
    return ModelError(
        "WSI341", f"{got}: {wanted}; wsitk runs plain and residual-encoder U-Nets in 3-D; use nnU-Net itself"
    )
