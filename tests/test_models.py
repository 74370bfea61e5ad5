"""The models shelf: sizes, shapes, initialisation, and the YAML files that choose from it."""

import importlib
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from fairexp.models.mlp import MLP
from fairexp.models.resnet import ResNet
from fairexp.models.vit import Block, ViT

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[1] / "configs/model"
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(8, 3, [64, 32], 10),
    "mlp_linear": lambda: MLP(8, 3, [], 10),
    "resnet_basic": lambda: ResNet(18, 10, stem="small", width=8, zero_init_residual=False),
    "resnet_bottleneck": lambda: ResNet(50, 10, width=8, zero_init_residual=False),
    "vit_cls": lambda: ViT(8, 2, 3, 10, width=64, depth=2, num_heads=4),
    "vit_mean": lambda: ViT(8, 2, 3, 10, width=64, depth=2, num_heads=4, pool="mean"),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def initialised(make: Callable[[], nn.Module]) -> Any:
    """The model as a run makes it: without values at first, then each tensor filled by name.

    NaN, and -1 in the integer buffers, stand wherever init_tensor leaves a value alone.
    """
    with torch.device("meta"):
        model: Any = make()
    model.to_empty(device="cpu")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        nn.init.constant_(tensor, float("nan") if tensor.is_floating_point() else -1)
        torch.manual_seed(0)
        model.init_tensor(name, tensor)
    return model


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ("resnet18", 11_689_512),  # ResNets: torchvision 0.28
        ("resnet50", 25_557_032),
        ("vit_tiny", 5_717_416),  # ViTs: timm and DeiT
        ("vit_small", 22_050_664),
        ("vit_base", 86_567_656),
        ("transformer", 726_144 + 50_257 * 128),
        ("gpt2_124m", 124_439_808),  # the checkpoint on Hugging Face
        ("mlp", 224 * 224 * 3 * 256 + 256 + 256 * 256 + 256 + 256 * 1000 + 1000),
    ],
)
def test_a_config_has_the_published_number_of_parameters(config: str, count: int) -> None:
    numbers = {"image_size": 224, "channels": 3, "num_classes": 1000, "vocab_size": 50_257, "seq_len": 1024}
    target, arguments = load(CONFIGS / f"{config}.yaml", **numbers)
    with torch.device("meta"):
        model = target(**arguments)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("config", "count"), [("llama_1b", 1_235_814_400), ("llama_8b", 8_030_261_248)])
def test_a_llama_has_the_published_number_of_parameters(config: str, count: int) -> None:
    target, arguments = load(CONFIGS / f"{config}.yaml", vocab_size=128_256, seq_len=8192)
    with torch.device("meta"):
        model = target(**arguments)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("depth", "count"), [(34, 21_797_672), (101, 44_549_160)])
def test_the_other_resnets_have_the_published_number_of_parameters(depth: Literal[34, 101], count: int) -> None:
    with torch.device("meta"):
        model = ResNet(depth, 1000)
    assert sum(p.numel() for p in model.parameters()) == count


@every_model
def test_images_become_class_scores(make: Callable[[], nn.Module]) -> None:
    scores = initialised(make)(torch.randn(3, 3, 8, 8))
    assert scores.shape == (3, 10)
    assert scores.isfinite().all()


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 16), ("small", 64)])
def test_only_the_imagenet_stem_shrinks_the_image(stem: Literal["imagenet", "small"], size: int) -> None:
    model = ResNet(18, 10, stem=stem, width=8).eval()
    seen: list[torch.Size] = []
    model.layer1[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(torch.randn(1, 3, 64, 64))
    assert seen == [(1, 8, size, size)]


@every_model
def test_init_tensor_fills_every_tensor_of_a_model_built_without_values(make: Callable[[], nn.Module]) -> None:
    for name, tensor in initialised(make).state_dict().items():
        assert tensor.isfinite().all(), name
        assert tensor.is_floating_point() or tensor.min() >= 0, name


@every_model
def test_the_state_dict_holds_every_tensor(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert len(model.state_dict()) == len([*model.parameters(), *model.buffers()])


@every_model
def test_the_gradient_reaches_every_parameter(make: Callable[[], nn.Module]) -> None:
    model = initialised(make)
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@every_model
def test_every_list_holds_blocks_that_can_be_wrapped_one_by_one(make: Callable[[], nn.Module]) -> None:
    lists = [module for module in make().modules() if isinstance(module, nn.ModuleList)]
    assert lists
    assert not any(isinstance(block, nn.ModuleList) for blocks in lists for block in blocks)


def test_an_mlp_starts_as_torch_starts_linear_layers() -> None:
    model = initialised(lambda: MLP(16, 1, [1024], 10))
    for name, fan_in in ("layers.0", 256), ("head", 1024):
        for tensor in model.get_submodule(name).parameters():
            assert tensor.abs().max() <= fan_in**-0.5
        assert model.get_parameter(f"{name}.weight").std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
    assert model.get_parameter("layers.0.bias").std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.1)


def test_a_resnet_starts_with_kaiming_convolutions_and_fresh_norms() -> None:
    model = initialised(lambda: ResNet(18, 1000, zero_init_residual=False))
    fan_out = 9 * 512
    assert model.get_parameter("layer4.1.conv2.weight").std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)
    assert model.get_parameter("fc.weight").std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.01)
    for name, tensor in model.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            assert (tensor == name.endswith(("weight", "running_var"))).all(), name


@pytest.mark.parametrize(("depth", "last_norm"), [(18, "bn2"), (50, "bn3")])
def test_zero_init_residual_silences_the_last_norm_of_each_block_and_no_other(
    depth: Literal[18, 50], last_norm: str
) -> None:
    model = initialised(lambda: ResNet(depth, 10, width=8))
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    silent = {name for name, norm in norms.items() if not norm.weight.any()}
    assert silent == {name for name in norms if name.startswith("layer") and name.endswith(last_norm)}


def test_a_vit_starts_with_xaviers_weights_and_zero_biases() -> None:
    model = initialised(lambda: ViT(32, 4, 3, 100, width=192, depth=2, num_heads=3))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            std = 0.02  # positions, class token and head
            if name == "patch_embed.proj.weight":
                std = (3 * 4 * 4) ** -0.5
            elif name.startswith("blocks."):
                std = (2 / sum(tensor.shape)) ** 0.5
            assert tensor.std().item() == pytest.approx(std, rel=0.2 if name == "cls_token" else 0.03), name


def test_a_vit_block_computes_what_torchs_encoder_layer_computes() -> None:
    block = Block(width=64, num_heads=4, mlp_ratio=2.0, dropout=0.0)
    layer = nn.TransformerEncoderLayer(
        64, 4, 128, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {
        "attn.qkv.weight": "self_attn.in_proj_weight",
        "attn.qkv.bias": "self_attn.in_proj_bias",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    state = block.state_dict()
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    layer.load_state_dict(state)
    tokens = torch.randn(2, 17, 64)
    torch.testing.assert_close(block(tokens), layer(tokens))


def test_a_vit_reads_the_class_token_or_the_mean_of_the_patches() -> None:
    cls, mean = initialised(MODELS["vit_cls"]), initialised(MODELS["vit_mean"])
    assert cls.get_parameter("pos_embed").shape == (1, 17, 64)
    assert mean.get_parameter("pos_embed").shape == (1, 16, 64)
    assert "cls_token" not in mean.state_dict()


@pytest.mark.parametrize("make", [lambda p: MLP(8, 1, [64], 10, p), lambda p: ViT(8, 2, 1, 10, 32, 1, 2, dropout=p)])
def test_dropout_acts_in_training_only(make: Callable[[float], nn.Module]) -> None:
    model, images = make(0.5), torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(20, 10), "depth=20: a ResNet has depth 18, 34, 50, 101"),  # type: ignore[arg-type]
        (lambda: ResNet(18, 10, stem="big"), "stem='big'"),  # type: ignore[arg-type]
        (lambda: ViT(30, 16, 3, 10, 64, 2, 4), "image_size=30 is not a multiple of patch_size=16"),
        (lambda: ViT(8, 16, 3, 10, 64, 2, 4), "image_size=8 is not a multiple of patch_size=16"),
        (lambda: ViT(32, 16, 3, 10, 64, 2, 3), "width=64 is not divisible by num_heads=3"),
        (lambda: ViT(32, 16, 3, 10, 64, 2, 4, pool="max"), "pool='max'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_arguments_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_gives_every_argument_in_the_constructors_order(path: Path) -> None:
    target, arguments = load(path, image_size=32, channels=3, num_classes=10, vocab_size=50, seq_len=16)
    assert [*arguments] == [*inspect.signature(target).parameters]


def load(path: Path, **dataset: int) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """What a model's YAML names, and the arguments it gives beside the data set's numbers."""
    config = OmegaConf.create({"dataset": dataset, "model": OmegaConf.load(path)})
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    assert next(iter(arguments)) == "_target_"
    module, _, name = arguments.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), arguments
