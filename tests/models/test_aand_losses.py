# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from test_aand_training import small_model

from anomalib_fractalad import AAND


def parts_with_gradient(model: AAND) -> set[str]:
    parts = set()
    for name, parameter in model.model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            part, _, rest = name.partition(".")
            parts.add(rest.split(".")[1] if part == "amplifiers" else part)
    return parts


@pytest.mark.parametrize(("loss", "part"), [("focal", "gate"), ("amplification", "residual")])
def test_each_loss_of_stage_one_moves_its_own_part(loss: str, part: str) -> None:
    model = small_model(anomaly_generator="FractalAnomalyGenerator").train()
    statistics = {name: value.clone() for name, value in model.model.named_buffers()}
    model._amplify(torch.rand(2, 3, 64, 64))[loss].backward()
    assert parts_with_gradient(model) == {part}
    trained = [amplifier.get_submodule(part) for amplifier in model.model.amplifiers]
    assert all(parameter.grad.any() for module in trained for parameter in module.parameters())
    assert all(torch.equal(value, statistics[name]) for name, value in model.model.named_buffers())


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18"])
def test_the_loss_of_stage_two_moves_bottleneck_and_decoder(backbone: str) -> None:
    model = small_model(backbone=backbone).train()
    statistics = {name: value.clone() for name, value in model.model.named_buffers()}
    model._distill(torch.rand(2, 3, 64, 64))["distillation"].backward()
    assert parts_with_gradient(model) == {"student"}
    assert all(parameter.grad is not None for parameter in model.model.student.parameters())
    changed = {name for name, value in model.model.named_buffers() if not torch.equal(value, statistics[name])}
    assert {name.partition(".")[0] for name in changed} == {"student"}


def test_stage_one_in_one_piece() -> None:
    """The loss of drawn positions, all of them, against the whole maps with the true mask as the gate."""
    model = small_model().train()
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 16:48, 8:40] = 1
    images = torch.rand(2, 3, 64, 64)
    model.generator = lambda batch: (batch * (1 - mask), mask)
    expected = 0.0
    for amplifier, features in zip(model.model.amplifiers, model.model.teacher(images * (1 - mask)), strict=True):
        gate = (torch.nn.functional.adaptive_avg_pool2d(mask, features.shape[-2:]) > 0.3).float()
        advanced = features + gate * amplifier.residual(features)
        plain, moved = (f.movedim(1, -1).flatten(0, -2) for f in (features, advanced))
        anomalous = gate.flatten() > 0
        cosine = torch.nn.functional.cosine_similarity
        before = cosine(plain[~anomalous][:, None], plain[anomalous][None], dim=-1)
        after = cosine(plain[~anomalous][:, None], moved[anomalous][None], dim=-1)
        expected += 0.1 * (after - before + 0.3).relu().mean()
    torch.testing.assert_close(model._amplify(images)["amplification"], expected)


def test_object_mode_keeps_anomalies_and_comparisons_on_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "anomalib_fractalad.models.aand.amplification.draw_positions",
        lambda features, where, count: (seen.append(where), features.movedim(1, -1)[where.squeeze(1)][:count])[1],
    )
    images = torch.zeros(1, 3, 64, 64)
    images[..., 32:] = 0.8
    model = small_model(object_mode=True)
    model.generator = lambda batch: (torch.ones_like(batch), torch.ones_like(batch[:, :1]))
    model._amplify(images)
    for normal, anomalous in zip(seen[::2], seen[1::2], strict=True):
        width = normal.shape[-1]
        assert not normal.any()
        assert not anomalous[..., : width // 2 - width // 8].any()
        assert anomalous[..., width // 2 + width // 8 :].all()
