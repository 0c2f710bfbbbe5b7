"""`sdedit evaluate`: folders of results measured side by side, and the page that asks people."""

import csv
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

import sdedit
from sdedit import image
from sdedit.cli.main import main
from sdedit.evaluation import evaluate as measure
from sdedit.evaluation import open_inputs
from sdedit.export.features import open_lpips
from sdedit.opinions import a_is_left, preference, trials

COUNT = 12
NAMES = [f"{'sub/' * (i % 2)}{i:02d}" for i in range(COUNT)]


@pytest.fixture
def fill(tmp_path):
    """fill("folder", pixels (N, H, W, 3) or (N, H, W), suffix=".png") -> the folder, pictures named NAMES."""

    def write(folder: str, pixels: np.ndarray, suffix: str = ".png") -> Path:
        for name, one in zip(NAMES, pixels, strict=False):
            path = tmp_path / folder / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(one).save(path)
        return tmp_path / folder

    return write


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 8, 12, 3), np.uint8)


@pytest.fixture
def masks() -> np.ndarray:
    made = np.zeros((COUNT, 8, 12), np.uint8)
    made[:, 2:6, 3:9] = 255
    return made


@pytest.fixture
def folders(fill, pixels, masks) -> dict[str, Path]:
    """Guides; one method that is 10 levels brighter everywhere, one that inverts inside the mask; real pictures."""
    return {
        "guides": fill("in", pixels // 2, ".bmp"),
        "brighter": fill("brighter", pixels // 2 + 10),
        "inside": fill("inside", np.where(masks[..., None] > 0, 255 - pixels // 2, pixels // 2)),
        "real": fill("real", pixels[::-1]),
        "masks": fill("masks", masks),
    }


@pytest.fixture
def features(tmp_path) -> Path:
    """A feature network: the mean of each channel."""
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["features"], keepdims=0)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 3])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    graph = helper.make_graph(nodes, "means", [x], [features], [axes])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "means.onnx").write_bytes(made.SerializeToString())
    return tmp_path / "means.onnx"


@pytest.fixture
def lpips(tmp_path) -> Path:
    """A distance: the mean absolute difference."""

    class Distance(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).abs().mean(dim=(1, 2, 3))

    torch.jit.script(Distance()).save(str(tmp_path / "distance.pt"))
    return tmp_path / "distance.pt"


@pytest.fixture
def evaluate(capsys):
    """evaluate(*arguments) -> the object that --json prints."""

    def run(*arguments: object) -> dict:
        capsys.readouterr()
        assert main(["evaluate", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def fails(capsys, *arguments: object) -> tuple[int, str]:
    """The exit code and what stderr says."""
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


def everything(folders, features, lpips) -> list[object]:
    given = ["--guides", folders["guides"], "--methods", folders["brighter"], folders["inside"], "--real"]
    given += [folders["real"], "--masks", folders["masks"], "--features", features, "--feature-input", "own:-1:1"]
    return [*given, "--lpips", lpips, "--subset-size", 6, "--subsets", 10]


# --- measures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_features", [False, True])
def test_the_pictures_that_each_network_sees_are_counted(with_features, folders, features, lpips):
    inputs = open_inputs(folders["guides"], [folders["brighter"]], real=folders["real"])
    told = []
    networks = {"features": sdedit.open_features(features)} if with_features else {}
    distance = open_lpips(lpips)
    measure(inputs, lpips=distance, subset_size=6, on_pictures=lambda *now: told.append(now), **networks)
    total = COUNT * (5 if with_features else 2)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_every_method_is_measured_as_the_library_measures_it(folders, features, lpips, pixels, masks, evaluate):
    report = evaluate(*everything(folders, features, lpips))
    rows = {row["method"]: row for row in report["methods"]}
    assert list(rows) == ["guides", "brighter", "inside"]
    assert rows["guides"]["l2"]["value"] == rows["guides"]["lpips"]["value"] == 0
    assert rows["brighter"]["l2"]["value"] == pytest.approx(np.sqrt(8 * 12 * 3) * 10 / 255)
    assert rows["brighter"]["lpips"]["value"] == pytest.approx(10 / 127.5, rel=1e-5)
    assert rows["brighter"]["masked_lpips"]["value"] == pytest.approx(10 / 127.5 * (1 - 24 / 96), rel=1e-5)
    network = sdedit.open_features(features, sdedit.features.Convention(None, -1, 1))
    order = np.argsort(NAMES)
    own, real = network((pixels // 2 + 10)[order]), network(pixels[::-1][order])
    assert rows["brighter"]["kid"]["value"] == sdedit.kid(own, real, subset_size=6, subsets=10).value


def test_an_edit_that_keeps_to_its_mask_has_a_distance_of_exactly_zero_outside(folders, evaluate):
    report = evaluate("--guides", folders["guides"], "--methods", folders["inside"], folders["brighter"], "--masks",
                      folders["masks"])  # fmt: skip
    _, inside, brighter = report["methods"]
    assert inside["outside"] == {"value": 0, "standard_error": 0, "largest": 0}
    assert inside["l2"]["value"] > 1
    assert brighter["outside"]["value"] == pytest.approx(np.sqrt(72 * 3) * 10 / 255)


def test_our_own_masked_edits_change_nothing_outside(folders, network, tmp_path, evaluate):
    (tmp_path / "ours").mkdir()
    made = ["batch", folders["guides"], "--masks", folders["masks"], "-o", tmp_path / "ours", "-m", network]
    assert main([*map(str, made), "--steps", "2", "--backend", "ort-cpu", "--threads", "1"]) == 0
    report = evaluate("--guides", folders["guides"], "--methods", tmp_path / "ours", "--masks", folders["masks"])
    assert report["methods"][1]["outside"]["largest"] == 0
    assert report["methods"][1]["l2"]["value"] > 0


def test_guides_of_another_size_are_compared_as_the_engine_fits_them(folders, fill, picture, editor, evaluate):
    large = np.stack([picture(40, 20, seed) for seed in range(COUNT)])
    jobs = [editor.prepare(one, sdedit.EditOptions().resolved({})) for one in large]
    same = fill("same", np.stack([image.to_pixels(job.x) for job in jobs]))
    report = evaluate("--guides", fill("large", large), "--methods", same, folders["brighter"])
    assert (report["conditions"]["guide_size"], report["conditions"]["size"]) == ([40, 20], [12, 8])
    assert [row["l2"]["value"] > 0 for row in report["methods"]] == [False, False, True]


def test_the_report_states_the_networks_and_the_conditions(folders, features, lpips, evaluate):
    stated = evaluate(*everything(folders, features, lpips))["conditions"]
    assert (stated["guides"], stated["real"], stated["size"], stated["masks"]) == (COUNT, COUNT, [12, 8], True)
    assert stated["features"] == {
        "name": "means.onnx",
        "sha256": hashlib.sha256(features.read_bytes()).hexdigest(),
        "input": "own:-1.0:1.0",
        "subset_size": 6,
        "subsets": 10,
        "seed": 0,
    }
    assert stated["lpips"]["sha256"] == hashlib.sha256(lpips.read_bytes()).hexdigest()


def test_without_a_feature_network_there_is_l2_only_and_it_says_so(folders, capsys):
    assert main(["evaluate", "--guides", str(folders["guides"]), "--real", str(folders["real"])]) == 0
    said = capsys.readouterr()
    assert said.err == "without --features there is no KID: L2 only\n"
    assert said.out.splitlines()[0] == "| method | L2 |"
    assert "KID: not measured" in said.out


def test_names_that_folders_may_have_are_told_apart_and_fit_into_a_table(folders, fill, pixels, tmp_path, capsys):
    odd = [fill("guide", pixels // 2 + 20), fill("we|ird", pixels // 2 + 30)]
    report = tmp_path / "report.html"
    assert main(["evaluate", "--guides", str(folders["guides"]), "--methods", *map(str, odd), "-o", str(report)]) == 0
    assert "| we\\|ird | " in capsys.readouterr().out
    page = report.read_text()
    assert [f'alt="{label}: {min(NAMES)}"' in page for label in ("guides", "guide", "we|ird")] == [True] * 3
    assert len(set(re.findall(r'src="([^"]+)"', page))) == 3 * 8


def test_a_method_is_called_by_its_folders_name_however_it_is_reached(folders, evaluate, monkeypatch):
    monkeypatch.chdir(folders["brighter"])
    report = evaluate("--guides", "../in", "--methods", ".")
    assert [row["method"] for row in report["methods"]] == ["guides", "brighter"]


def test_masks_that_keep_no_pixel_say_nothing_of_what_is_outside(folders, fill, masks, evaluate):
    given = ("--guides", folders["guides"], "--methods", folders["brighter"], "--masks")
    full = evaluate(*given, fill("full", np.full_like(masks, 255)))
    assert [row["outside"] for row in full["methods"]] == [None, None]
    some = np.where(np.arange(COUNT)[:, None, None] == 0, masks, 255).astype(np.uint8)
    outside = evaluate(*given, fill("some", some))["methods"][1]["outside"]
    assert outside["value"] == pytest.approx(np.sqrt((8 * 12 - 24) * 3) * 10 / 255)


# --- reports -------------------------------------------------------------------------------------------------------


def test_one_report_in_four_formats(folders, features, lpips, tmp_path, capsys):
    written = {}
    for suffix in ("json", "csv", "md", "html"):
        arguments = [*everything(folders, features, lpips), "-o", tmp_path / f"report.{suffix}"]
        assert main(["evaluate", *map(str, arguments)]) == 0
        assert capsys.readouterr().out.startswith("| method | KID | L2 | LPIPS | masked LPIPS | L2 outside the mask |")
        written[suffix] = (tmp_path / f"report.{suffix}").read_text("utf-8")
    report = json.loads(written["json"])
    kid = report["methods"][1]["kid"]
    lines = list(csv.DictReader(io.StringIO(written["csv"])))
    assert [line["method"] for line in lines] == ["guides", "brighter", "inside"]
    assert float(lines[1]["kid"]) == kid["value"]
    assert float(lines[1]["kid_standard_error"]) == kid["standard_error"]
    assert lines[1]["size"] == "12x8"
    for text in (written["md"], written["html"]):
        assert f"{kid['value']:.4f} ± {kid['standard_error']:.4f}" in text
        assert report["conditions"]["features"]["sha256"] in text


def test_the_page_is_one_file_with_the_pictures_in_it(folders, pixels, tmp_path):
    page = tmp_path / "report.html"
    given = ["--guides", folders["guides"], "--methods", folders["brighter"], "-o", page]
    assert main(["evaluate", *map(str, given)]) == 0
    text = page.read_text("utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', text) == []
    assert text.count("data:image/png;base64,") == 8 * 2  # eight guides and their results


def test_a_report_replaces_nothing_unasked(folders, tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine")
    given = ["--guides", folders["guides"], "-o", tmp_path / "report.md"]
    code, said = fails(capsys, *given)
    assert (code, (tmp_path / "report.md").read_text()) == (1, "mine")
    assert "exists already" in said
    assert main(["evaluate", *map(str, given), "--force"]) == 0


# --- bad input -----------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_compared(folders, features, fill, pixels, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    guides = ["--guides", folders["guides"]]
    kid = ["--real", folders["real"], "--features", features]
    few = fill("few", pixels[:-2])
    wide = fill("wide", pixels.transpose(0, 2, 1, 3))
    mixed = fill("mixed", pixels)
    Image.fromarray(pixels[0].transpose(1, 0, 2)).save(mixed / "02.png")
    refused = [
        ([*guides, "--methods", tmp_path / "none"], 1, "none: no such folder"),
        ([*guides, "--methods", tmp_path / "empty"], 1, "empty: no pictures in it"),
        ([*guides, "--methods", few], 1, "few: has no 10, sub/11, which "),
        (["--guides", few, "--methods", folders["brighter"]], 1, "few: has no 10, sub/11, which "),
        ([*guides, "--masks", few], 1, "few: has no 10, sub/11, which "),
        ([*guides, "--methods", folders["brighter"], wide], 1, "00.png: is 8x12, others are 12x8"),
        (["--guides", mixed, "--methods", folders["brighter"]], 1, "02.png: is 8x12, others are 12x8"),
        ([*guides, "--real", wide], 1, "is 8x12, others are 12x8"),
        ([*guides, *kid], 2, "KID over subsets of 100 needs 100 pictures on each side; there are 12 and 12"),
        ([*guides, "--features", features], 2, "--features without --real"),
        ([*guides, "--feature-input", "own:0:1"], 2, "--feature-input without --features"),
        ([*guides, "--methods", folders["brighter"], folders["brighter"]], 2, "a method is named twice"),
        ([*guides, *kid[:2], "--features", tmp_path / "none.onnx"], 1, "none.onnx: no such file"),
        ([*guides, *kid[:2], "--features", tmp_path / "none.pt"], 1, "none.pt: no such file"),
        ([*guides, "-o", tmp_path / "report.pdf"], 2, "wanted a name in .html, .md, .csv, .json"),
        ([], 2, "no --guides"),
    ]
    for arguments, code, message in refused:
        found = fails(capsys, *arguments)
        assert (code, message in found[1]) == (found[0], True), found
        assert "others are" not in message or "scale them first, to 12x8 say" in found[1]


def test_two_pictures_of_one_name_are_refused(folders, capsys, pixels):
    Image.fromarray(pixels[0]).save(folders["brighter"] / "00.jpg")
    assert "00.jpg and 00.png have one name" in fails(
        capsys, "--guides", folders["guides"], "--methods", folders["brighter"]
    )[1]  # fmt: skip


@pytest.mark.parametrize("text", ["299", "own:a:1", "299:0:1:2"])
def test_a_feature_input_that_is_none_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "--feature-input", text])
    assert left.value.code == 2
    assert "SIZE:LOW:HIGH" in capsys.readouterr().err


# --- people --------------------------------------------------------------------------------------------------------


def data_of(page: Path) -> dict:
    (held,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"))
    return json.loads(held)


@pytest.fixture
def page(folders, tmp_path) -> Path:
    made = ["--pairs", folders["brighter"], folders["inside"], "--guides", folders["guides"], "--count", 10]
    assert main(["evaluate", *map(str, made), "--seed", "5", "-o", str(tmp_path / "pairs.html")]) == 0
    return tmp_path / "pairs.html"


def test_a_page_asks_both_questions_of_as_many_guides_as_it_is_told(page):
    data = data_of(page)
    asked = [(trial["question"], trial["name"]) for trial in data["trials"]]
    assert [question for question, _ in asked] == ["realism"] * 10 + ["faithfulness"] * 10
    assert len(set(asked)) == 20
    assert {name for _, name in asked} <= set(NAMES)
    assert [trial["guide"] is None for trial in data["trials"]] == [True] * 10 + [False] * 10


def test_a_page_shows_the_pictures_on_the_sides_that_the_key_says_and_does_not_say_it(page, folders, pixels):
    import base64

    data = data_of(page)
    for trial in data["trials"]:
        shown = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(data["pictures"][trial[side]].partition(",")[2]))))
            for side in ("left", "right")
        ]
        brighter = pixels[NAMES.index(trial["name"])] // 2 + 10
        assert np.array_equal(shown[not a_is_left(5, trial["question"], trial["name"])], brighter)
        assert set(trial) == {"question", "name", "guide", "left", "right"}
    assert "brighter" not in page.read_text("utf-8").replace(json.dumps(data["study"]), "")


def test_sides_are_drawn_evenly_and_follow_the_seed():
    names = [str(i) for i in range(1000)]
    drawn = trials(names, ["realism"], count=1000, seed=1)
    assert 0.45 < np.mean([one.a_is_left for one in drawn]) < 0.55
    assert drawn == trials(names, ["realism"], count=1000, seed=1)
    assert drawn != trials(names, ["realism"], count=1000, seed=2)
    assert [one.name for one in drawn] != names


def answers(page: Path, path: Path, prefers_a) -> Path:
    """What a person saves who prefers A where `prefers_a(number)` says so."""
    data = data_of(page)
    given = []
    for number, trial in enumerate(data["trials"]):
        left = a_is_left(data["study"]["seed"], trial["question"], trial["name"]) == prefers_a(number)
        given.append({k: trial[k] for k in ("question", "name")} | {"chosen": "left" if left else "right"})
    path.write_text(json.dumps({"study": data["study"], "answers": given}))
    return path


def test_answers_come_back_as_percentages(page, tmp_path, capsys):
    one = answers(page, tmp_path / "one.json", lambda number: number < 12)  # all of realism, 2 of faithfulness
    other = answers(page, tmp_path / "other.json", lambda number: number < 5)  # half of realism, none
    capsys.readouterr()
    assert main(["evaluate", "--answers", str(one), str(other), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    shares = {row["question"]: (row["share_a"], row["answers"]) for row in said["preferences"]}
    assert shares == {"realism": (0.75, 20), "faithfulness": (0.1, 20)}
    assert Path(said["a"]).name == "brighter"
    assert main(["evaluate", "--answers", str(one)]) == 0
    assert "| Which picture is more real? | 100.0 % | 72.2 … 100.0 % | 10 |" in capsys.readouterr().out


def test_the_interval_is_wilsons():
    found = preference("realism", [True] * 60 + [False] * 40)
    assert (found.low, found.high) == (pytest.approx(0.502003, abs=1e-5), pytest.approx(0.690599, abs=1e-5))


def test_answers_that_are_none_are_refused(page, folders, tmp_path, capsys):
    capsys.readouterr()
    good = answers(page, tmp_path / "good.json", bool)
    other = json.loads(good.read_text())
    other["study"]["a"] = "another"
    files = {"text": "hello", "list": "[]", "empty": '{"study": {"seed": 1, "a": "x", "b": "y"}, "answers": []}',
             "side": good.read_text().replace('"left"', '"middle"'), "other": json.dumps(other)}  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    for names, message in [
        (["text"], "text.json: not answers of a page that --pairs wrote"),
        (["list"], "list.json: not answers of a page"),
        (["side"], "side.json: not answers of a page"),
        (["empty"], "there is no answer to read"),
        (["good", "other"], "other.json: compares another and"),
        (["none"], "none.json: cannot be read"),
    ]:
        code, said = fails(capsys, "--answers", *(tmp_path / f"{name}.json" for name in names))
        assert (code, message in said) == (2, True), said
    code, said = fails(capsys, "--answers", good, "--real", folders["real"])
    assert (code, "--real is not for --answers" in said) == (2, True), said
