"""Encoders: pooling, scales, projection, whitening, and that what is saved is what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from iir_dist import artifact
from iir_dist.errors import ConfigError, CorruptError, InputError
from iir_dist.models import backbones, encoder
from iir_dist.models.encoder import Encoder, EncoderConfig, WhiteningSpec
from iir_dist.models.pooling import GeM, RegionalGeM


def small(**changes: object) -> EncoderConfig:
    return EncoderConfig.model_validate({"backbone": "resnet18", "weights": "random", "size": 64, **changes})


def photos(n: int = 3, side: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (encoder.create(small(seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    x = photos()
    assert torch.equal(a(x), b(x))
    assert not torch.equal(a(x), c(x))


@pytest.mark.parametrize("pooling", ["gem", "spoc", "mac", "rmac"])
@pytest.mark.parametrize("scales", [[1.0], [1.0, 0.7071, 0.5]])
def test_unit_vectors(pooling: str, scales: list[float]) -> None:
    v = encoder.create(small(pooling=pooling, scales=scales))(photos())
    assert v.shape == (3, 512)
    assert v.dtype == torch.float32
    assert torch.allclose(v.norm(dim=1), torch.ones(3), atol=1e-6)


def test_scales_combine_by_the_published_rule() -> None:
    """cirtorch: v = (mean of v_s^p)^(1/p), p = GeM's, then L2."""
    network = encoder.create(small(scales=[1.0, 0.5]))
    x = photos()
    with torch.no_grad():
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True)
        parts = [network.describe(x), network.describe(half)]
        expected = F.normalize((sum(v**3 for v in parts) / 2) ** (1 / 3), dim=1)
        assert torch.allclose(network(x), expected, atol=1e-6)


def test_scale_gem_is_the_maximum_and_flip_the_mean() -> None:
    x = photos()
    network = encoder.create(small(scales=[1.0, 0.5], scale_rule="max"))
    with torch.no_grad():
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True)
        expected = F.normalize(torch.maximum(network.describe(x), network.describe(half)), dim=1)
        assert torch.allclose(network(x), expected, atol=1e-6)
        both = encoder.create(small(flip=True))
        mirrored = F.normalize(both.describe(x) + both.describe(x.flip(3)), dim=1)
        assert torch.allclose(both(x), mirrored, atol=1e-6)
        assert torch.allclose(both(x), both(x.flip(3)), atol=1e-5)  # which is the use of it


def test_regional_gem_comes_before_the_pooling() -> None:
    x = photos(2, 160)
    plain, regional = encoder.create(small()), encoder.create(small(regional_gem=True))
    with torch.no_grad():
        feature_map = plain.trunk((x - plain.mean) / plain.std)
        expected = F.normalize(GeM()(RegionalGeM()(feature_map)), dim=1)
        assert torch.allclose(regional(x), expected, atol=1e-5)
        assert not torch.allclose(regional(x), plain(x), atol=1e-3)


def test_saved_and_loaded_is_the_same_network_bit_for_bit(tmp_path: Path) -> None:
    config = small(scales=[1.0, 0.7071], p=2.5, scale_rule="max", regional_gem=True, flip=True)
    manifest = encoder.run(str(tmp_path / "e"), config)
    folder, _ = artifact.require(tmp_path / "e", "encoder")
    again = encoder.load(folder, manifest)
    with torch.no_grad():
        assert torch.equal(again(photos()), encoder.create(config)(photos()))
    assert again.spec.p == 2.5
    assert encoder.run(str(tmp_path / "f"), config).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("backbone", ["resnet18", "timm:test_resnet"])
def test_relu_plus_is_rebuilt(backbone: str, tmp_path: Path) -> None:
    config = small(backbone=backbone, relu_plus=True)
    manifest = encoder.run(str(tmp_path / "e"), config)
    again = encoder.load(artifact.require(tmp_path / "e", "encoder")[0], manifest)
    with torch.no_grad():
        assert torch.equal(again(photos()), encoder.create(config)(photos()))
        assert not torch.allclose(again(photos()), encoder.create(small(backbone=backbone))(photos()), atol=1e-4)
    assert manifest.info["encoder"]["relu_plus"] is True
    with pytest.raises(ConfigError, match=r"encoder\.relu_plus = true: efficientnet_lite0 is no ResNet"):
        encoder.create(EncoderConfig(relu_plus=True))


@pytest.mark.parametrize("pooling", ["spoc", "rmac", "cls"])
def test_behind_the_trunk_autocast_is_off(pooling: str) -> None:
    """Pooling, projection and whitening compute in float32, whatever the trunk does."""
    base = encoder.create(small(backbone="timm:test_vit" if pooling == "cls" else "resnet18", pooling=pooling))
    learnt = {"dim": 20, "power": 0.5, "learnt_on": "", "base": ""}
    changes: dict[str, object] = {"projection": 9, "whitening": WhiteningSpec.model_validate({**learnt, "dim": 5})}
    if pooling == "rmac":
        changes["region_whitening"] = WhiteningSpec.model_validate({**learnt, "method": "regions"})
    network = Encoder(base.spec.model_copy(update=changes), base.trunk)
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if not name.startswith("trunk."):
            value.copy_(torch.randn(value.shape, generator=generator))
    x = photos()
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            v = network(x)
            token, feature_map = network.trunk.tokens((x - network.mean) / network.std)
        assert not torch.equal(feature_map.float(), network.trunk((x - network.mean) / network.std))
        pooled = F.normalize(network.pool(feature_map.float()) if token is None else token, dim=1)
        assert network.projection is not None
        expected = network.whiten(F.normalize(network.projection(pooled), dim=1))
    assert v.dtype == torch.float32
    assert torch.equal(v, expected)


def test_a_damaged_encoder_is_refused(tmp_path: Path) -> None:
    manifest = encoder.run(str(tmp_path / "e"), small())
    folder, _ = artifact.require(tmp_path / "e", "encoder")
    path = tmp_path / "e" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"weights\.safetensors has other content"):
        encoder.load(folder, manifest)


def test_centring_keeps_what_the_trunk_knows() -> None:
    """A square centred projection gives the cosines of centred vectors."""
    base = encoder.create(small())
    x = photos(6)
    with torch.no_grad():
        v = base.pooled(x)
        projected = encoder.project(base, 512)
        encoder.centre(projected, v)
        z = projected(x)
        expected = F.normalize(v - v.mean(dim=0), dim=1)
        assert torch.allclose(z @ z.T, expected @ expected.T, atol=1e-4)
        narrow = encoder.project(base, 5)  # six centred vectors span five dimensions: nothing is lost
        encoder.centre(narrow, v)
        assert torch.allclose(narrow(x) @ narrow(x).T, expected @ expected.T, atol=1e-4)
    with pytest.raises(ConfigError, match="513 dimensions: the encoder has 512"):
        encoder.project(base, 513)


def test_weights_from_a_file(tmp_path: Path) -> None:
    """A published file: classifier head and all, torch or safetensors; the head is left out, the rest must fit."""
    import torchvision
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = torchvision.models.resnet18(weights=None)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    save_file(net.state_dict(), str(tmp_path / "w.safetensors"))
    x = photos()
    expected = encoder.create(small(weights=str(tmp_path / "w.pth")))(x)
    assert torch.equal(expected, encoder.create(small(weights=str(tmp_path / "w.safetensors")))(x))
    assert not torch.equal(expected, encoder.create(small())(x))
    with torch.no_grad():
        features = net.layer4(net.layer3(net.layer2(net.layer1(
            net.maxpool(net.relu(net.eval().bn1(net.conv1(_imagenet(x)))))))))  # fmt: skip
        assert torch.allclose(expected, F.normalize(GeM()(features), dim=1), atol=1e-5)


def _imagenet(x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbones.IMAGENET)
    return (x - mean) / std


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = encoder.create(small()).trunk.net.state_dict()  # type: ignore[union-attr]
    first = next(iter(state))
    wrong = {**{k: v for k, v in state.items() if k != first}, "extra.weight": torch.zeros(1)}
    torch.save(wrong, tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"1 missing \(first: {first}\); 1 unexpected \(first: extra.weight\)"):
        encoder.create(small(weights=str(tmp_path / "w.pth")))
    with pytest.raises(InputError, match="no such file"):
        encoder.create(small(weights="nothing.pth"))
    with pytest.raises(ConfigError, match="no ImageNet weights of resnet18"):
        encoder.create(small(weights="imagenet"))


def test_a_pickle_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    import os

    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"conv1.weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not readable as plain tensors"):
        encoder.create(small(weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "ran").exists()


def test_unknown_backbones_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"known: convnext_base, .*resnet50, timm:NAME"):
        small(backbone="vgg")
    with pytest.raises(ConfigError, match="known: efficientnet_lite0"):
        backbones.build_backbone("vgg")


def test_pooling_by_the_class_token(tmp_path: Path) -> None:
    config = EncoderConfig(backbone="timm:vit_tiny_patch16_224", weights="random", size=64, pooling="cls")
    manifest = encoder.run(str(tmp_path / "e"), config)
    network = encoder.load(artifact.require(tmp_path / "e", "encoder")[0], manifest)
    x = photos(2, 64)
    with torch.no_grad():
        token, feature_map = network.trunk.tokens((x - network.mean) / network.std)  # type: ignore[operator]
        assert torch.allclose(network(x), F.normalize(token, dim=1), atol=1e-6)
        assert feature_map.shape == (2, 192, 4, 4)
        assert torch.equal(network(x), encoder.create(config)(x))
    with pytest.raises(ConfigError, match=r"encoder\.pooling = 'cls': resnet18 has no class token"):
        encoder.create(small(pooling="cls"))


def test_the_packaged_classifier_loads() -> None:
    network = encoder.create(EncoderConfig())
    v = network(photos(2, 224))
    assert v.shape == (2, 1280)
    # Trained features differ from random ones: they are sparse after ReLU6.
    assert isinstance(network, Encoder)
    assert (network.trunk((photos(2, 224) - network.mean) / network.std) == 0).float().mean() > 0.5
