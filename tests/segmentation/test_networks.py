import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.segmentation.loss import build_loss
from dpkernels.segmentation.model import (
    build_network,
    head_outputs,
    total_stride,
)
from dpkernels.segmentation.networks import CentredConv3d, CentredUNet
from dpkernels.segmentation.presets import PRESETS


def test_centred_filters_do_not_see_a_constant():
    conv = CentredConv3d(3, 4, kernel_size=3, bias=False)
    torch.manual_seed(0)
    image = torch.randn(1, 3, 6, 6, 6)
    torch.testing.assert_close(conv(image), conv(image + 5.0), atol=1e-4, rtol=0)


def test_the_papers_network_keeps_the_grid_and_has_its_size():
    network = CentredUNet(1, 3)
    assert network(torch.zeros(1, 1, 32, 16, 16)).shape == (1, 3, 32, 16, 16)
    assert total_stride(PRESETS["msd-liver"]["network"]) == 16
    with pytest.raises(ValueError, match="groups must divide"):
        CentredUNet(1, 3, channels=(6, 12))


SMALL = {
    "msd-liver": {"channels": [8, 16]},
    "msd-liver-fast": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [8, 8, 8],
    },
    "phantom": {"channels": [4, 8], "strides": [2]},
    "phantom-study": {"channels": [4, 8], "strides": [2]},
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("views", [1, 2])
def test_preset_networks_have_the_clipped_gradients_of_one_patient_at_a_time(preset, views):
    block = {**PRESETS[preset]["network"], **SMALL[preset]}
    network = build_network(block, in_channels=1, out_channels=3, seed=0).double().train()
    criterion = build_loss(PRESETS[preset]["loss"], 3).criterion
    torch.manual_seed(0)
    image = torch.rand(3 * views, 1, 8, 8, 8, dtype=torch.float64)
    label = torch.randint(0, 3, (3 * views, 1, 8, 8, 8))
    parameters = list(network.parameters())

    def patient(index):
        rows = slice(index * views, (index + 1) * views)
        loss = criterion(network(image[rows]), label[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    gradients = [patient(i) for i in range(3)]
    norms = torch.stack([g.norm() for g in gradients])
    bound = float(norms.median())
    expected = sum(g * min(1.0, bound / float(n)) for g, n in zip(gradients, norms, strict=True))

    model, optimizer, _ = PrivacyEngine().make_private(
        module=network,
        optimizer=torch.optim.SGD(parameters, lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.zeros(3)), batch_size=3),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        views_per_sample=views,
    )
    criterion(model(image), label).backward()
    found = torch.cat([p.grad.flatten() for p in parameters]) * 3
    assert float((found - expected).norm() / expected.norm()) < 1e-9
    torch.testing.assert_close(
        optimizer.last_step.per_sample_norm.double(), norms, rtol=1e-6, atol=0
    )


def test_total_strides_of_monai_networks():
    assert total_stride({"_target_": "monai.networks.nets.UNet", "strides": [2, 2, 2]}) == 8
    assert total_stride({"_target_": "x.DynUNet", "strides": [1, [1, 2, 2], 2]}) == 4
    assert total_stride({"_target_": "x.SegResNet", "blocks_down": [1, 2, 2, 4]}) == 8
    assert total_stride({"_target_": "x.SwinUNETR"}) == 32
    assert total_stride({"_target_": "x.BasicUNet"}) == 16


def test_initialisation_follows_the_seed_and_leaves_the_global_generator_alone():
    block = PRESETS["phantom"]["network"]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (build_network(block, in_channels=1, out_channels=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    first = [next(iter(n.parameters())) for n in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_heads_of_every_form():
    stack = torch.zeros(2, 3, 4, 8, 8, 8)
    assert [h.shape for h in head_outputs(stack)] == [(2, 4, 8, 8, 8)] * 3
    assert len(head_outputs((stack[:, 0], stack[:, 1]))) == 2
    assert len(head_outputs(stack[:, 0])) == 1
