"""Prompt files, prediction of files, resolving which network a user means, and protocols by name."""

from __future__ import annotations

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.samhq_commands import write_images, written

from rfmedsam2.engine.checkpoint import save_model
from rfmedsam2.errors import CheckpointError, RfMedSamError, UsageError
from segment_anything_hq.data.image_io import read_image
from segment_anything_hq.data.prompt_files import PromptedObject, images_in, read_prompts
from segment_anything_hq.evaluation.protocols import BoxRule, CenterRule, RandomRule
from segment_anything_hq.evaluation.run import parse_protocol, parse_protocols
from segment_anything_hq.inference.files import OBJECTS_PER_BATCH, predict_files, predict_masks, require_free_outputs
from segment_anything_hq.inference.image_transform import embed, make_transform
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.inference.network_spec import NetworkSpec, load_network, resolve_spec
from segment_anything_hq.models import base_sha256, build
from segment_anything_hq.nn.trainable_subset import TrainedPart
from segment_anything_hq.prompts.prompt import Click, Prompt
from segment_anything_hq.records import RefinerRecord
from segment_anything_hq.tasks.defaults import default_plan
from segment_anything_hq.tasks.network_size import PUBLISHED, network_size

NETWORKS = {
    "sam": "vit_nano",
    "hq_sam": "vit_nano",
    "sam_ref": "vit_nano",
    "sam2": "hiera_nano",
    "hq_sam2": "hiera_nano",
    "sam2_ref": "hiera_nano",
    "sam2_refiner": "hiera_nano",
}


@pytest.fixture
def images(tmp_path):
    return images_in([write_images(tmp_path / "data") / "images"])


def loaded(method: str, frame_size: int = 64):
    return load_network(resolve_spec(NetworkSpec(method=method, backbone=NETWORKS[method], frame_size=frame_size)))


def read(tmp_path, images, content, name="prompts.json"):
    return read_prompts(written(tmp_path / name, content), images)


def clicks_at(*points: tuple[float, float, int]) -> tuple[Click, ...]:
    """Clicks of (x, y, label)."""
    return tuple(Click(x=x, y=y, positive=label == 1) for x, y, label in points)


def faults(tmp_path, images, content, name="prompts.json") -> str:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, images, content, name)
    return str(caught.value)


# prompts


def test_json_gives_boxes_points_and_names(tmp_path, images):
    entries = [
        {"image": "a.png", "box": [1, 2, 30, 20.5]},
        {"image": "b", "points": [[3, 4], [5, 6]], "labels": [1, 0], "name": "cat"},
        {"image": "a.png", "box": [0, 0, 60, 40], "points": [[9, 9]], "labels": [1]},
    ]
    found = read(tmp_path, images, entries)
    assert found == read(tmp_path, images, {"prompts": entries})
    first, second, cat = found
    assert (first.file, second.file, cat.file) == ("a_1.png", "a_2.png", "cat.png")
    assert first.prompt == Prompt(box=(1, 2, 30, 20.5))
    assert second.prompt == Prompt(box=(0, 0, 60, 40), clicks=clicks_at((9, 9, 1)))
    assert cat.prompt == Prompt(clicks=clicks_at((3, 4, 1), (5, 6, 0)))
    assert cat.image == images[1]


def test_csv_gives_boxes_a_row_and_points_by_object(tmp_path, images):
    boxes = read(tmp_path, images, "image,x0,y0,x1,y1\na.png,1,2,30,20\nb.png,0,0,9,9\na.png,3,3,9,9\n", "p.csv")
    assert [(o.file, o.prompt.box) for o in boxes] == [
        ("a_1.png", (1, 2, 30, 20)),
        ("a_2.png", (3, 3, 9, 9)),
        ("b.png", (0, 0, 9, 9)),
    ]
    lines = "image,object,x,y,label\na.png,7,1,2,1\na.png,5,3,4,1\na.png,7,5,6,0\n"
    points = read(tmp_path, images, lines, "p.csv")
    assert [(o.file, o.prompt.clicks) for o in points] == [
        ("a_7.png", clicks_at((1, 2, 1), (5, 6, 0))),
        ("a_5.png", clicks_at((3, 4, 1))),
    ]
    header = "image,object,x0,y0,x1,y1,x,y,label\n"
    both = f"{header}a.png,1,1,2,30,20,,,\na.png,1,,,,,4,5,1\nb.png,,,,,,1,1,1\nb.png,,,,,,2,2,0\n"
    box, clicks = read(tmp_path, images, both, "p.csv")
    assert (box.file, box.prompt) == ("a.png", Prompt(box=(1, 2, 30, 20), clicks=clicks_at((4, 5, 1))))
    assert (clicks.file, clicks.prompt.box, len(clicks.prompt.clicks)) == ("b.png", None, 2)


@pytest.mark.parametrize(
    "text",
    [
        "image;x0;y0;x1;y1\na.png;1;2;30;20\n",
        "sep=;\r\nimage;x0;y0;x1;y1\r\na.png;1;2;30;20\r\n",
        "image\tx0\ty0\tx1\ty1\na.png\t1\t2\t30\t20\n",
        "image,x0,y0,x1,y1,\n,,,,,\na.png,1,2,30,20,\n,,,,,\n",
    ],
)
def test_csv_of_spreadsheets_is_read(text, tmp_path, images):
    (tmp_path / "wide.csv").write_bytes(text.encode("utf-16"))
    for found in (read(tmp_path, images, text, "p.csv"), read_prompts(tmp_path / "wide.csv", images)):
        assert [(box.file, box.prompt) for box in found] == [("a.png", Prompt(box=(1, 2, 30, 20)))]


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path, images):
    other = tmp_path / "other" / "a.png"
    other.parent.mkdir()
    shutil.copy(images[0], other)
    both = images_in([images[0].parent, other.parent, tmp_path / "other" / ".." / "other"])
    assert both == (*images, other)
    for name in ("a.png", "a"):
        assert "several images have this name: " in faults(tmp_path, both, [{"image": name, "box": [1, 1, 2, 2]}])
    for path in (images[0], other):
        [found] = read(tmp_path, both, [{"image": f"{path.parent.name}/a.png", "box": [1, 1, 2, 2]}])
        assert found.image == path
    [found] = read(tmp_path, images, [{"image": f"{images[0].parent.name}/a.png", "box": [1, 1, 2, 2]}])
    assert found.image == images[0]
    assert "image not found" in faults(tmp_path, images, [{"image": "elsewhere/a.png", "box": [1, 1, 2, 2]}])


BAD = {
    "no_such_image": ({"image": "z.jpg", "box": [1, 1, 2, 2]}, r"prompt 1 \(z\.jpg\): image not found"),
    "no_image": ({"box": [1, 1, 2, 2]}, 'prompt 1: "image" is missing'),
    "box_outside": ({"image": "a.png", "box": [1, 1, 61, 9]}, "box lies outside: 1, 1, 61, 9, the image is 60 wide"),
    "box_backwards": ({"image": "a.png", "box": [9, 9, 5, 5]}, "box ends before it begins: 9, 9, 5, 5"),
    "box_of_three": ({"image": "a.png", "box": [1, 1, 2]}, "box is not four numbers x0, y0, x1, y1, but 1, 1, 2"),
    "box_of_words": ({"image": "a.png", "box": [1, "two", 3, 4]}, "box is not four numbers.*two"),
    "box_of_a_word": ({"image": "a.png", "box": "all"}, "box is not four numbers.*'all'"),
    "box_of_true": ({"image": "a.png", "box": [True, 1, 2, 3]}, "box is not four numbers"),
    "box_of_a_giant": ({"image": "a.png", "box": [10**400, 1, 2, 3]}, "box is not four numbers"),
    "points_without_labels": ({"image": "a.png", "points": [[1, 1]]}, "it has 1 point and 0 labels"),
    "too_many_labels": ({"image": "a.png", "points": [[1, 1]], "labels": [1, 0]}, "it has 1 point and 2 labels"),
    "labels_alone": ({"image": "a.png", "box": [1, 1, 2, 2], "labels": [1]}, "it has 0 points and 1 label"),
    "label_of_two": ({"image": "a.png", "points": [[1, 1]], "labels": [2]}, "a label is not 1 .* but 2"),
    "point_outside": ({"image": "a.png", "points": [[60, 1]], "labels": [1]}, "a point lies outside: 60, 1"),
    "point_of_one": ({"image": "a.png", "points": [[1]], "labels": [1]}, "a point is not two numbers x, y, but 1"),
    "points_no_list": ({"image": "a.png", "points": 3, "labels": [1]}, "points is not a list"),
    "neither": ({"image": "a.png"}, "neither a box nor points"),
    "empty_points": ({"image": "a.png", "points": [], "labels": []}, "neither a box nor points"),
    "unknown_field": ({"image": "a.png", "bbox": [1, 1, 2, 2]}, "unknown fields bbox; known are image, box"),
    "bad_name": ({"image": "a.png", "box": [1, 1, 2, 2], "name": "../a"}, r"'\.\./a' is not a valid file name"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_faulty_prompt_is_a_sentence(case, tmp_path, images):
    entry, sentence = BAD[case]
    assert re.search(sentence, faults(tmp_path, images, [entry]))


def test_all_faults_are_told_at_once(tmp_path, images):
    told = faults(tmp_path, images, [{"image": "a.png", "box": [1, 1, 2, 2]}, *(entry for entry, _ in BAD.values())])
    assert f"The prompts have {len(BAD) + 1} faults" in told  # the unknown field's prompt has neither box nor points
    assert told.count("prompt ") == len(BAD) + 1


def test_masks_of_one_name_are_a_fault(tmp_path, images):
    entry = {"image": "a.png", "box": [1, 1, 2, 2]}
    assert "its mask a.png has the same name as that of prompt 1" in faults(
        tmp_path, images, [entry, {**entry, "image": "b.png", "name": "a"}]
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image,x0,y0,x1,y1\na.png,1,2,thirty,20\n", r"line 2 \(a\.png\): the box is not four numbers.*thirty"),
        ("image,x0,y0,x1,y1\na.png,1,2,nan,20\n", "the box is not four numbers"),
        ("image,x0,y0,x1,y1\na.png,1,2,30\n", "the box lacks y1"),
        ("image,x0,y0,x1,y1\na.png,1,2,30,20,8\n", "line 2: more values than columns"),
        ("image,x0,y0,x1,y1\na.png,,,,\n", "neither a box nor points"),
        ("image,object,x,y,label\na.png,1,3,4,\n", "the point lacks label"),
        ("image,object,x,y,label\na.png,1,3,4,maybe\n", "a label is not 1 .* but 'maybe'"),
        ("image,object,x0,y0,x1,y1\na.png,1,1,1,2,2\na.png,1,1,1,3,3\n", "object 1 already has a box"),
        (
            "image,x,y,label,width\na.png,1,1,1,5\n",
            r"Wrong columns.*Found image, x, y, label, width",
        ),
        ("x0,y0,x1,y1\n1,1,2,2\n", "Wrong columns"),
        ("image,x0,y0,x1,y1\n", "contains no prompts"),
        ("", "Found an empty file"),
    ],
)
def test_a_faulty_csv_is_a_sentence(text, sentence, tmp_path, images):
    assert re.search(sentence, faults(tmp_path, images, text, "p.csv"))


def test_files_that_are_no_prompts_are_sentences(tmp_path, images):
    assert "not valid JSON" in faults(tmp_path, images, "[{")
    assert "contains no prompts" in faults(tmp_path, images, [])
    assert "not a list of prompts" in faults(tmp_path, images, {"image": "a.png"})
    assert "ends in .json or .csv" in faults(tmp_path, images, "", "p.txt")
    (tmp_path / "latin.json").write_bytes(b'[{"image": "\xe4.png"}]')
    with pytest.raises(UsageError, match="not text"):
        read_prompts(tmp_path / "latin.json", images)
    with pytest.raises(UsageError, match="Prompt file not found"):
        read_prompts(tmp_path / "nowhere.json", images)
    with pytest.raises(UsageError, match="Image or folder not found"):
        images_in([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"No images found.*\.jpg"):
        images_in([tmp_path / "empty"])


def test_a_damaged_picture_is_among_the_faults(tmp_path, images):
    images[0].write_bytes(b"no image")
    told = faults(tmp_path, images, [{"image": "a.png", "box": [1, 1, 2, 2]}, {"image": "b.png"}])
    assert "2 faults" in told
    assert "cannot be read as an image" in told


# masks


def objects_of(image) -> list[PromptedObject]:
    """With and without a box, with different numbers of points."""
    return [
        PromptedObject(image=image, file=f"{number}.png", prompt=prompt)
        for number, prompt in enumerate(
            (
                Prompt(box=(8, 10, 24, 30)),
                Prompt(clicks=clicks_at((12, 14, 1), (50, 35, 0), (2, 2, 0))),
                Prompt(box=(30, 5, 55, 35), clicks=clicks_at((40, 20, 1))),
                Prompt(clicks=clicks_at((33, 20, 1))),
            ),
            1,
        )
    ]


@pytest.mark.parametrize("method", NETWORKS)
def test_objects_side_by_side_are_as_clicks_and_boxes_one_by_one(method, tmp_path, images):
    network = loaded(method)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    objects = objects_of(images[0])
    record = predict_files(network, objects, tmp_path / "out")
    assert [o.file for o in record.objects] == [o.file for o in objects]
    predictor = InteractivePredictor(network.network, fit=network.fit)
    predictor.set_image(read_image(images[0]))
    for prompted, found in zip(objects, record.objects, strict=True):
        alone = predictor.segment(prompted.prompt)
        mask = np.asarray(Image.open(tmp_path / "out" / prompted.file))
        assert mask.shape == (40, 60)
        assert set(np.unique(mask)) <= {0, 255}
        assert np.mean((mask > 0) != (alone > 0.5)) < 0.002
        assert found.pixels == np.count_nonzero(mask)


def test_an_image_is_encoded_once_and_its_objects_are_batches(tmp_path, images, monkeypatch):
    network = loaded("sam")
    encoded, batches = [], []
    encode, segment = network.network.encode, network.network.segment
    monkeypatch.setattr(network.network, "encode", lambda frames: encoded.append(1) or encode(frames))
    monkeypatch.setattr(network.network, "segment", lambda e, p, **o: batches.append(len(p)) or segment(e, p, **o))
    many = [
        PromptedObject(image=image, file=f"{image.stem}{i}.png", prompt=Prompt(box=(1, 1, 20, 9 + i)))
        for i, image in itertools.product(range(OBJECTS_PER_BATCH + 1), images)
    ]
    predict_files(network, many, tmp_path / "out")
    assert len(encoded) == 2
    assert batches == [OBJECTS_PER_BATCH, 1, OBJECTS_PER_BATCH, 1]


def test_rows_are_padded_and_lie_in_the_frame(images):
    transform = make_transform((40, 60), 128, "stretch")
    two = [prompted.prompt for prompted in objects_of(images[0])]
    rows = transform.prompts([two[1], two[3]], torch.device("cpu"))
    assert rows.boxes is None
    assert rows.point_labels.tolist() == [[1, 0, 0], [1, -1, -1]]
    assert rows.points[1, 0].tolist() == pytest.approx([33 * 128 / 60, 20 * 128 / 40])
    with pytest.raises(UsageError, match="2 of 4 with a box"):
        transform.prompts(two, torch.device("cpu"))


def test_frame_masks_are_restored_to_the_image():
    for fit, resized in (("pad", (43, 64)), ("stretch", (64, 64))):
        transform = make_transform((40, 60), 64, fit)
        assert transform.resized == resized
        logits = torch.full((1, 16, 16), -1.0)
        logits[:, : round(resized[0] / 8)] = 1.0  # the upper half of the image
        seen = transform.logits(logits)[0] > 0
        assert seen.shape == (40, 60)
        assert abs(seen.float().mean() - 0.5) < 0.05


def test_nothing_is_overwritten_unasked_and_images_never(tmp_path, images):
    objects = [PromptedObject(image=images[0], file="a.png", prompt=Prompt(box=(1, 1, 9, 9)))]
    with pytest.raises(UsageError, match=r"overwrite images or prompts.*Found a\.png"):
        require_free_outputs(images[0].parent, objects, overwrite=True)
    require_free_outputs(tmp_path / "new", objects, overwrite=False)
    predict_files(loaded("sam"), objects, tmp_path / "new")
    with pytest.raises(UsageError, match=r"already exist.*a\.png, predictions\.json.*overwrite=True"):
        require_free_outputs(tmp_path / "new", objects, overwrite=False)
    require_free_outputs(tmp_path / "new", objects, overwrite=True)


@pytest.mark.parametrize("names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("stra\u00dfe", "STRASSE")])
def test_masks_that_some_systems_keep_in_one_file_are_refused(names, tmp_path, images):
    content = [{"image": images[0].name, "box": [1, 1, 9, 9], "name": name} for name in names]
    with pytest.raises(UsageError, match=rf"its mask {names[1]}\.png has the same name as that of prompt 1"):
        read(tmp_path, images, content)


def test_masks_belong_to_their_own_image(images):
    network = loaded("sam").network
    transforms = [make_transform(read_image(image).shape[:2], 64, "pad") for image in images]
    with torch.inference_mode():
        embedded = [embed(network, read_image(i), f) for i, f in zip(images, transforms, strict=True)]
    shapes = [
        next(
            predict_masks(network, e, f, [PromptedObject(image=i, file="", prompt=Prompt(box=(1, 1, 9, 9)))])
        ).mask.shape
        for e, f, i in zip(embedded, transforms, images, strict=True)
    ]
    assert shapes == [(40, 60), (50, 30)]


# which network


def test_new_weights_are_the_same_every_time_and_said():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = loaded("hq_sam"), loaded("hq_sam")
    assert first.weights_sha256 == second.weights_sha256
    assert torch.equal(torch.get_rng_state(), before)
    assert first.notes == ("vit_nano has random weights: for tests only",)
    assert "SHA-256" in first.facts()


def test_what_a_method_adds_is_said_to_be_new(tmp_path):
    torch.save(build("sam", "vit_nano", frame_size=64).state_dict(), tmp_path / "base.pt")
    notes = {}
    for method in ("sam", "sam_ref", "sam_decoder"):
        spec = NetworkSpec(method=method, backbone="vit_nano", weights=tmp_path / "base.pt", frame_size=64)
        notes[method] = load_network(resolve_spec(spec)).notes
    assert notes["sam"] == ()
    assert "is untrained" in notes["sam_ref"][0]
    assert "not fine-tuned" in notes["sam_decoder"][0]


def checkpoint(path, method="sam_ref", seed=3):
    """As a training of a new base leaves it."""
    plan = default_plan(method, NETWORKS[method], samples=2)
    plan = plan.model_copy(update={"frame_size": 64, "train": plan.train.model_copy(update={"seed": seed})})
    torch.manual_seed(seed)
    network = build(method, NETWORKS[method], frame_size=64)
    record = RefinerRecord(
        plan=plan,
        base="new",
        base_sha256=base_sha256(network),
        step=1,
        weights_sha256="",
        code_version="0",
        torch_version="0",
        created="2026-01-01T00:00:00+00:00",
    )
    part = TrainedPart(network)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1)
    save_model(path, record, part)
    return network


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    trained = checkpoint(tmp_path / "model.pt")
    named = resolve_spec(NetworkSpec(model=tmp_path / "model.pt"))
    assert (named.method, named.backbone, named.frame_size, named.seed) == ("sam_ref", "vit_nano", 64, 3)
    assert named == resolve_spec(NetworkSpec(model=tmp_path / "model.pt", method="sam_ref", backbone="vit_nano"))
    found = load_network(named)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], tensor), name
    assert found.facts()["checkpoint"] == "model.pt"


def test_choices_that_do_not_fit_are_sentences(tmp_path):
    checkpoint(tmp_path / "model.pt")
    torch.save(build("sam", "vit_nano", frame_size=64).state_dict(), tmp_path / "other.pt")
    said = {
        r"No network was given.*METHOD with backbone and weights.*hq_sam": {},
        r"sam needs a backbone": {"method": "sam"},
        r"hq_sam on vit_b needs the weights of vit_b.*Expected weights": {"method": "hq_sam", "backbone": "vit_b"},
        r"another method than given.*Expected hq_sam\. Found sam_ref": {"model": "model.pt", "method": "hq_sam"},
        r"another backbone than given.*Expected vit_b\. Found vit_nano": {"model": "model.pt", "backbone": "vit_b"},
        r"another frame size than given.*Expected 128\. Found 64": {"model": "model.pt", "frame_size": 128},
        r"Invalid frame size.*Found 100": {"method": "hq_sam", "backbone": "vit_nano", "frame_size": 100},
        r"hq_sam2 is not built on vit_nano": {"method": "hq_sam2", "backbone": "vit_nano"},
        r"trained on other frozen weights": {"model": "model.pt", "weights": "other.pt"},
        r"file of weights does not exist": {"method": "sam", "backbone": "vit_nano", "weights": "none.pt"},
        r"another backbone.*Expected weights of vit_b .*Found weights of vit_nano": {
            "method": "sam",
            "backbone": "vit_b",
            "weights": "other.pt",
        },
        r"has its own mask decoder": {"method": "hq_sam", "backbone": "vit_nano", "decoder": "model.pt"},
    }
    for sentence, words in said.items():
        files = {k: tmp_path / v if k in ("model", "weights", "decoder") else v for k, v in words.items()}
        with pytest.raises(RfMedSamError, match=sentence):
            load_network(resolve_spec(NetworkSpec(**files)))
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError):
        resolve_spec(NetworkSpec(model=tmp_path / "junk.pt"))


# protocols and sizes


def test_protocols_have_names():
    assert parse_protocol("box") == BoxRule()
    assert parse_protocol("box_0.4") == BoxRule(noise=0.4)
    assert parse_protocol("center") == CenterRule()
    assert parse_protocol("points_5") == RandomRule(count=5)
    assert parse_protocol("sat") is None
    assert parse_protocol("clicks", clicks=3).miou_at == ()
    for name in ("boxes", "box_1.5", "box_-1", "points_0", "points_", "Clicks", "noc"):
        with pytest.raises(UsageError, match=r"Unknown protocol|must be at least 1"):
            parse_protocol(name)
    with pytest.raises(UsageError, match="max_clicks"):
        parse_protocol("clicks", clicks=0)


def test_the_british_spelling_of_a_protocol_is_accepted():
    assert parse_protocol("centre") == CenterRule()
    assert list(parse_protocols(("centre", "box", "center"))) == ["center", "box"]


@pytest.mark.parametrize(("method", "backbone"), PUBLISHED)
def test_what_is_learned_is_as_large_as_published(method, backbone):
    size = network_size(method, backbone)
    assert size.published is not None
    assert size.as_published == pytest.approx(size.published.value, rel=0.15)
    assert size.parameters == sum(p.trained + p.frozen for p in size.parts)
