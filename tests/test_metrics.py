"""KID, L2 and the networks of the user's own that measure pictures."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import sdedit
from sdedit import features as onnx_features
from sdedit import metrics
from sdedit.export import features as torch_features
from sdedit.features import Convention


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    """Features of 60 pictures and of 80 others that differ a little."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 16)), rng.normal(0.2, 1.1, size=(80, 16))


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (5, 8, 6, 3), np.uint8)


# --- KID -----------------------------------------------------------------------------------------------------------


def test_mmd2_is_the_unbiased_estimate_written_out(sets):
    a, b = (one[:7] for one in sets)

    def kernel(x, y):
        return (x @ y / 16 + 1) ** 3

    within = [sum(kernel(s[i], s[j]) for i, j in itertools.permutations(range(7), 2)) / 42 for s in (a, b)]
    across = sum(kernel(x, y) for x in a for y in b) / 49
    assert metrics.mmd2(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kid_equals_torchmetrics_over_the_same_subsets(sets, monkeypatch):
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = sets
    draws = [order for pair in metrics._subsets([b, a], 20, 12, seed=3) for order in pair]
    replay = iter(draws)
    monkeypatch.setattr(kid.torch, "randperm", lambda n: torch.from_numpy(next(replay)))  # ours, whole
    theirs = kid.KernelInceptionDistance(feature=torch.nn.Identity(), subsets=12, subset_size=20)
    theirs.real_features, theirs.fake_features = [torch.from_numpy(b)], [torch.from_numpy(a)]
    mean, _ = theirs.compute()
    ours = sdedit.kid(b, a, subset_size=20, subsets=12, seed=3)
    assert ours.value == pytest.approx(float(mean), rel=1e-5)  # theirs is stored as float32
    assert (ours.subset_size, ours.subsets) == (20, 12)


def test_leaving_one_picture_out_is_computed_without_computing_all_again(sets):
    a, b = sets
    without_a, without_b = metrics._left_out(a, b)
    assert without_a[3] == pytest.approx(metrics.mmd2(np.delete(a, 3, 0), b), rel=1e-9)
    assert without_b[5] == pytest.approx(metrics.mmd2(a, np.delete(b, 5, 0)), rel=1e-9)


def test_the_standard_error_is_how_much_kid_differs_between_sets_of_pictures():
    rng = np.random.default_rng(4)
    found = [
        sdedit.kid(rng.normal(size=(150, 16)), rng.normal(0.2, 1, (150, 16)), subset_size=50, subsets=50)
        for _ in range(60)
    ]
    assert np.mean([one.standard_error for one in found]) == pytest.approx(
        np.std([one.value for one in found]), rel=0.25
    )


def test_kid_is_unbiased_where_both_sets_are_alike():
    rng = np.random.default_rng(5)
    found = [sdedit.kid(*rng.normal(size=(2, 40, 8)), subset_size=10, subsets=20).value for _ in range(100)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 10
    assert min(found) < 0 < max(found)


def test_a_paired_difference_is_the_difference_of_both_kids_and_surer_than_they_are(sets):
    a, real = sets
    close = a + 0.05 * np.random.default_rng(6).normal(size=a.shape)
    chosen = {"subset_size": 30, "subsets": 40, "seed": 2}
    difference = sdedit.kid_difference(a, close, real, **chosen)
    alone = [sdedit.kid(one, real, **chosen) for one in (a, close)]
    assert difference.value == pytest.approx(alone[0].value - alone[1].value, rel=1e-9)
    assert 0 < difference.standard_error < alone[0].standard_error / 2


def test_kid_follows_its_seed(sets):
    assert sdedit.kid(*sets, subset_size=30) == sdedit.kid(*sets, subset_size=30)
    assert sdedit.kid(*sets, subset_size=30, seed=1).value != sdedit.kid(*sets, subset_size=30).value


def test_too_few_pictures_are_told_how_many_are_needed(sets):
    with pytest.raises(sdedit.OptionError) as failed:
        sdedit.kid(*sets)
    assert str(failed.value) == "KID over subsets of 100 needs 100 pictures on each side; there are 60 and 80"
    assert failed.value.hint == "give at least 100 pictures on both sides, or smaller subsets"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a[:, :3], b), "features of 3 and of 16 values"),
        (lambda a, b: (a[0], b), r"the first features are \(16,\); wanted \(pictures, features\)"),
        (lambda a, b: (a, b * np.nan), "the second features have NaN or Inf"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(sets, change, message):
    with pytest.raises(sdedit.OptionError, match=message):
        sdedit.kid(*change(*sets), subset_size=10)


# --- L2 ------------------------------------------------------------------------------------------------------------


def test_l2_by_hand():
    guide = np.zeros((2, 1, 2, 3), np.uint8)
    result = guide.copy()
    result[0, 0, 0] = [255, 0, 0]
    result[1] = 51  # a fifth, six times
    assert sdedit.l2(guide, result) == pytest.approx([1, np.sqrt(6 * 0.04)])
    assert sdedit.l2(guide / 255, result / 255) == pytest.approx([1, np.sqrt(6 * 0.04)])


def test_l2_outside_a_mask_counts_only_what_is_wholly_kept():
    guide = np.zeros((1, 1, 3, 3), np.uint8)
    result = np.array([0, 255, 255], np.uint8).reshape(1, 1, 3, 1).repeat(3, -1)
    mask = np.array([[0, 1, 255]], np.uint8)  # keep, a soft edge, repaint
    assert sdedit.l2(guide, result, mask=mask) == [0]
    assert sdedit.l2(guide, result, mask=mask[:, ::-1])[0] == pytest.approx(np.sqrt(3))


def test_l2_of_other_shapes_is_refused(pictures):
    with pytest.raises(sdedit.OptionError, match=r"guides are \(5, 8, 6, 3\) and results \(4, 8, 6, 3\)"):
        sdedit.l2(pictures, pictures[:4])
    with pytest.raises(sdedit.OptionError, match=r"mask is \(8, 8\); wanted \(5, 8, 6\) or \(8, 6\)"):
        sdedit.l2(pictures, pictures, mask=np.zeros((8, 8)))
    for mask in (0, "mask.png", np.zeros(pictures.shape[2])):
        with pytest.raises(sdedit.OptionError, match="mask is "):
            sdedit.l2(pictures, pictures, mask=mask)
    for wrong in (pictures.astype(int), pictures.astype(float) + 2, np.full(pictures.shape, np.nan)):
        with pytest.raises(sdedit.OptionError, match="not uint8, and not floats"):
            sdedit.l2(wrong, wrong)


# --- networks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def channel_means(tmp_path):
    """The mean of each channel, as ONNX and as TorchScript."""

    class Means(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["features"], keepdims=0)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 3])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    graph = helper.make_graph(nodes, "means", [x], [features], [axes])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "means.onnx").write_bytes(made.SerializeToString())
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    return tmp_path / "means.onnx", tmp_path / "means.pt"


@pytest.fixture
def root_mean_square(tmp_path):
    """A distance of two pictures."""

    class Distance(torch.nn.Module):
        def forward(self, a, b):
            return ((a - b) ** 2).mean(dim=(1, 2, 3), keepdim=True).sqrt()

    torch.jit.script(Distance()).save(str(tmp_path / "distance.pt"))
    return tmp_path / "distance.pt"


def test_torchscript_and_onnx_give_the_same_features(channel_means, pictures):
    unscaled = Convention(None, -1, 1)
    onnx, script = (torch_features.open_features(path, unscaled) for path in channel_means)
    expected = (pictures / 127.5 - 1).mean(axis=(1, 2))
    assert onnx(pictures) == pytest.approx(expected, abs=1e-6)
    assert script(pictures) == pytest.approx(expected, abs=1e-6)
    assert onnx(pictures).dtype == np.float32
    assert (onnx.name, len(onnx.sha256), str(onnx.convention)) == ("means.onnx", 64, "own:-1:1")


def test_a_feature_network_is_fed_what_fids_inception_wants_by_default(pictures):
    x = onnx_features.to_network(pictures, Convention())
    assert (x.shape, x.dtype) == ((5, 3, 299, 299), np.float32)
    flat = np.full((1, 4, 4, 3), 200, np.uint8)
    assert onnx_features.to_network(flat, Convention()) == pytest.approx((200 - 128) / 128)


def test_pictures_are_enlarged_without_rounding():
    ramp = np.array([0, 1], np.uint8).reshape(1, 1, 2, 1).repeat(2, 1).repeat(3, 3)
    x = onnx_features.to_network(ramp, Convention(4, 0, 255))[0, 0, 0]
    assert x == pytest.approx([0, 0.25, 0.75, 1])


def test_a_network_that_asks_whether_to_return_features_is_told_so(tmp_path, pictures):
    class Inception(torch.nn.Module):
        def forward(self, x, return_features: bool = False):
            means = x.mean(dim=(2, 3))
            return means if return_features else means[:, :1]

    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    network = torch_features.open_features(tmp_path / "inception.pt", Convention(None, 0, 255))
    assert network(pictures) == pytest.approx(pictures.mean(axis=(1, 2)), rel=1e-5)


def test_lpips_is_fed_minus_one_to_one(root_mean_square, pictures):
    distance = torch_features.open_lpips(root_mean_square)
    expected = np.sqrt((((pictures - pictures[::-1].astype(float)) / 127.5) ** 2).mean(axis=(1, 2, 3)))
    assert distance(pictures, pictures[::-1]) == pytest.approx(expected, rel=1e-5)


def test_masked_lpips_sees_only_what_is_kept(root_mean_square, pictures):
    distance = torch_features.open_lpips(root_mean_square)
    mask = np.zeros(pictures.shape[:3], np.uint8)
    mask[:, 2:5, 1:] = 255
    changed = np.where(mask[..., None] > 0, 255 - pictures, pictures)
    assert distance(pictures, changed, mask=mask) == pytest.approx(0)
    assert distance(pictures, changed, mask=255 - mask).min() > 0.1


def test_what_a_distance_cannot_compare_is_refused(root_mean_square, pictures):
    distance = torch_features.open_lpips(root_mean_square)
    for pair in ((pictures[:0], pictures[:0]), (pictures / 255, pictures / 255)):
        with pytest.raises(sdedit.OptionError, match=r"wanted uint8 \(N, H, W, 3\)"):
            distance(*pair)
    for pair, mask in (((pictures, pictures[:, 1:]), None), ((pictures, pictures), np.zeros((1, 2, 2), np.uint8))):
        with pytest.raises(sdedit.OptionError, match=r"pictures are \(5, "):
            distance(*pair, mask=mask)


def test_features_that_are_no_numbers_name_their_network(tmp_path, pictures):
    class Log(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3)).log()

    class Nothing(torch.nn.Module):
        def forward(self, x):
            return x[:, :0].mean(dim=(2, 3))

    for net, said in ((Log(), "net.pt: returned NaN or Inf"), (Nothing(), r"net.pt: returned float32 \(5, 0\)")):
        torch.jit.script(net).save(str(tmp_path / "net.pt"))
        with pytest.raises(sdedit.ArtifactError, match=said):
            torch_features.open_features(tmp_path / "net.pt", Convention(None, -1, 0))(0 * pictures)


def test_the_whole_cause_of_a_failure_is_told(tmp_path, channel_means, pictures):
    path = tmp_path / "FIXED.ONNX"
    model = onnx.load(channel_means[0])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    with pytest.raises(sdedit.ArtifactError, match=r"FIXED.ONNX: cannot run .* Got: 5 Expected: 2"):
        sdedit.open_features(path, Convention(None, -1, 1))(pictures)


def test_networks_that_are_none_are_refused(tmp_path, channel_means, root_mean_square, pictures):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    (tmp_path / "broken.pt").write_bytes(b"no network")
    refused = [
        (lambda: sdedit.open_features(tmp_path / "none.onnx"), "none.onnx: no such file"),
        (lambda: sdedit.open_features(tmp_path / "broken.onnx"), "broken.onnx: ONNX Runtime cannot load it"),
        (lambda: torch_features.open_features(tmp_path / "broken.pt"), "broken.pt: not TorchScript"),
        (lambda: onnx_features.open_lpips(channel_means[0]), "means.onnx: has 1 inputs; wanted 2"),
        (lambda: torch_features.open_features(root_mean_square)(pictures), "distance.pt: cannot run on float32"),
    ]
    for attempt, message in refused:
        with pytest.raises(sdedit.ArtifactError, match=message):
            attempt()
    with pytest.raises(sdedit.OptionError, match=r"not an \.onnx file"):
        sdedit.open_features(channel_means[1])


def test_a_network_that_gives_no_row_a_picture_is_refused(tmp_path, pictures):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean().reshape(1)

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    with pytest.raises(sdedit.ArtifactError, match=r"returned float32 \(1,\) for 5 pictures; wanted a row for each"):
        torch_features.open_features(tmp_path / "mean.pt", Convention(None, 0, 1))(pictures)
