"""Images with captions: scenes, files in their layouts, words as numbers, padded batches."""

import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidl.captioning import BucketSampler, Vocabulary, caption_loader, tokenize
from minidl.captioning.vocabulary import BOS, EOS, PAD, SPECIAL, UNK
from minidl.data import (
    CocoCaptions,
    DataError,
    DataLoader,
    Digits,
    DigitStrings,
    Flickr8k,
    MissingDataError,
    ShapeScenes,
)
from minidl.data.augment import RandomCrop
from minidl.data.scenes import COLOURS, HELD_OUT, RELATIONS, SHAPES, SIZES, draw, imagine, place
from minidl.data.transforms import CenterCrop, Compose, Resize

# ShapeScenes ------------------------------------------------------------------------------


def pairs(scenes):
    return {(group.colour, group.shape) for scene in scenes for group in scene.groups}


def test_held_out_pairs_never_occur_in_training():
    assert len(SHAPES) == 6 and len(COLOURS) == 8 and len(SIZES) == 3 and len(RELATIONS) == 4
    for split in ("train", "val"):
        scenes = ShapeScenes(split, 2000).scenes
        assert pairs(scenes) == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT
    new = ShapeScenes("test", 500).scenes
    assert all(pairs([scene]) & HELD_OUT for scene in new)
    assert pairs(new) >= HELD_OUT
    # Every colour and every shape is known from training, only not together.
    known = set(itertools.product(COLOURS, SHAPES)) - HELD_OUT
    assert {c for c, _ in known} == set(COLOURS) and {s for _, s in known} == set(SHAPES)


def test_scenes_have_all_counts_and_relations():
    scenes = ShapeScenes("train", 500).scenes
    assert {sum(g.number for g in s.groups) for s in scenes} == {1, 2, 3, 4}
    assert {s.relation for s in scenes} == {None, *RELATIONS}
    assert all(s.groups[0][2:] != s.groups[1][2:] for s in scenes if s.relation)


def test_compounds_of_the_test_are_new_words():
    """Every letter of them is known from training, but no word of them."""

    def compounds(split):
        captions = itertools.chain(*ShapeScenes(split, 500, compounds=True).captions)
        return {
            w for w in itertools.chain(*map(str.split, captions)) if w.startswith(tuple(COLOURS))
        }

    held_out = tuple(colour + shape for colour, shape in HELD_OUT)
    new = {word for word in compounds("test") if word.startswith(held_out)}
    assert len(new) >= 8 and not new & compounds("train")
    one, two = (ShapeScenes("test", 50, compounds=c).captions for c in (False, True))
    assert [[c.replace(" ", "") for c in some] for some in one] == [
        [c.replace(" ", "") for c in some] for some in two
    ]


def test_digit_strings_are_those_digits():
    strings, singles = DigitStrings(train=False, length=20), Digits(train=False)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    image, (caption,) = strings[7]
    assert image.shape == (1, 8, 24) and image.dtype == np.float32
    for part, word in zip(np.split(image, 3, axis=2), caption.split(), strict=True):
        (where,) = [i for i in range(len(singles)) if np.array_equal(singles[i][0], part)]
        assert names[singles[where][1]] == word
    assert DigitStrings(length=4, digits=5)[0][0].shape == (1, 8, 40)
    assert DigitStrings(train=False, length=30).captions[:20] == strings.captions
    assert DigitStrings(train=False, length=20, seed=1).captions != strings.captions
    assert np.array_equal(
        DigitStrings(length=1, transform=lambda x: -x)[0][0], -DigitStrings()[0][0]
    )
    for wrong in ({"length": 0}, {"digits": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            DigitStrings(**wrong)


def test_captions_follow_the_grammar():
    data = ShapeScenes("train", 200)
    noun = (
        rf"(a|two|three|four) ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(e?s)?"
    )
    for captions in data.captions:
        assert len(captions) in (2, 4) and len(set(captions)) == len(captions)
        for caption in captions:
            match = re.fullmatch(
                rf"(there (is|are) )?{noun}( ({'|'.join(RELATIONS)}) {noun})?", caption
            )
            assert match, caption
            assert (match[3] == "a") == (match[7] is None), caption
            assert match[2] is None or (match[2] == "is") == (match[3] == "a"), caption


def test_pictures_show_what_captions_say():
    """Without the network: objects lie as the relation says, do not touch, and have the colour."""
    for i in range(60):
        rng = np.random.default_rng(i)
        scene = imagine(rng, held_out=i % 2 == 0)
        state = rng.bit_generator.state
        placed = place(scene, rng)
        for (g, x, y), (h, u, v) in itertools.combinations(placed, 2):
            assert np.hypot(x - u, y - v) > SIZES[g.size] + SIZES[h.size]
        if scene.relation:
            one, other = (np.array([p[1:] for p in placed if p[0] is g]) for g in scene.groups)
            axis, sign = {
                "left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1),
            }[scene.relation]  # fmt: skip
            assert (sign * one[:, axis]).max() < (sign * other[:, axis]).min()
        rng.bit_generator.state = state
        rng.integers(15, 60, 3)  # the ground's colour, which `draw` draws first
        placed, rng.bit_generator.state = place(scene, rng), state
        picture = draw(scene, 64, rng)
        for group, x, y in placed:
            pixel = picture[:, int(y * 64), int(x * 64)].astype(int)
            nearest = min(COLOURS, key=lambda name: np.abs(COLOURS[name] - pixel).sum())
            assert nearest == group.colour


def test_scenes_depend_on_their_number_only():
    one, other = ShapeScenes("val", 30, seed=3), ShapeScenes("val", 20, seed=3)
    assert one.captions[:20] == other.captions
    later = other[7][0]
    assert np.array_equal(one[7][0], later) and np.array_equal(other[7][0], later)
    assert one[7][0].shape == (3, 64, 64) and one[7][0].dtype == np.float32
    assert one[7][1] == one.captions[7]
    assert ShapeScenes("val", 30, seed=4).captions != one.captions
    assert np.array_equal(one[-1][0], one[29][0])
    with pytest.raises(IndexError):
        one[30]


@pytest.mark.parametrize("arguments", [("dev",), ("train", 0), ("train", 10, 0, 32)])
def test_scenes_refuse(arguments):
    with pytest.raises(ValueError, match=r"expected one of|at least"):
        ShapeScenes(*arguments)


# Files ------------------------------------------------------------------------------------

NAMES = [f"{i:02d}_x.jpg" for i in range(10)]


def write_images(folder, names=NAMES):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (20 + i, 16), (10 * i, 0, 0)).save(folder / name)


@pytest.fixture
def official(tmp_path):
    write_images(tmp_path / "Flicker8k_Dataset")
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    lines = [f"{name}#{k}\tA dog , number {k} ." for name in NAMES for k in range(5)]
    (text / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for part, names in (("train", NAMES[:6]), ("dev", NAMES[6:8]), ("test", NAMES[8:])):
        (text / f"Flickr_8k.{part}Images.txt").write_text("\n".join(names) + "\n")
    return tmp_path


@pytest.fixture
def table(tmp_path):
    write_images(tmp_path / "images")
    lines = [f'{name},"A dog , number {k} ."' for name in NAMES for k in range(2)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    return tmp_path


def test_official_layout(official):
    train = Flickr8k(official)
    assert [p.name for p in train.paths] == NAMES[:6]
    assert [p.name for p in Flickr8k(official, "val").paths] == NAMES[6:8]
    assert len(Flickr8k(official, None)) == 10
    image, captions = train[3]
    assert image.shape == (3, 16, 23) and captions[4] == "A dog , number 4 ."
    assert image[0].mean() == pytest.approx(30 / 255, abs=0.02)


def test_csv_layout_is_split_once_and_for_all(table):
    parts = [[p.name for p in Flickr8k(table, s).paths] for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [8, 1, 1]
    assert sorted(itertools.chain(*parts)) == NAMES
    assert parts[2] == [NAMES[np.random.RandomState(0).permutation(10)[9]]]
    assert Flickr8k(table)[0][1] == ["A dog , number 0 .", "A dog , number 1 ."]
    (table / "captions.csv").rename(table / "captions.txt")  # as another distribution has it
    (table / "images").rename(table / "Images")
    assert len(Flickr8k(table, None)) == 10


def test_what_is_wrong_with_files_is_said_with_the_line(table):
    def broken(old, new):
        path = table / "captions.csv"
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError) as error:
            Flickr8k(table, None)
        path.write_text(text)
        return str(error.value)

    at = "captions.csv, line 4"
    assert f"{at}: the caption of {NAMES[1]} is empty" in broken(
        f'{NAMES[1]},"A dog , number 0 ."', f"{NAMES[1]}, . "
    )
    assert at in broken(f'{NAMES[1]},"A dog , number 0 ."', NAMES[1])
    assert "captions.csv, line 1: expected image,caption" in broken("image,caption", "a,b")
    (table / "images" / NAMES[1]).unlink()
    assert at in broken("x", "x") and NAMES[1] in broken("x", "x")
    with pytest.raises(DataError, match="not UTF-8"):
        (table / "captions.csv").write_bytes(b"image,caption\na,\xff\xfe\n")
        Flickr8k(table)


def test_a_damaged_photograph_is_named(table):
    (table / "images" / NAMES[0]).write_bytes(b"\xff\xd8\xff\xe0 no more")
    data = Flickr8k(table, None)
    index = [p.name for p in data.paths].index(NAMES[0])
    with pytest.raises(DataError, match=f"{NAMES[0]}: not an image"):
        data[index]
    whole = (table / "images" / NAMES[1]).read_bytes()
    (table / "images" / NAMES[0]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=NAMES[0]):
        data[index]


def test_official_files_that_do_not_fit(official):
    with pytest.raises(ValueError, match="expected one of train, val, test"):
        Flickr8k(official, "dev")
    text = official / "Flickr8k_text"
    with open(text / "Flickr_8k.trainImages.txt", "a") as file:
        file.write("nobody.jpg\n")
    with pytest.raises(DataError, match=r"trainImages.txt, line 7: nobody.jpg has no captions"):
        Flickr8k(official)
    with open(text / "Flickr8k.token.txt", "a") as file:
        file.write("no tab here\n")
    with pytest.raises(DataError, match=r"token.txt, line 51: expected image#number"):
        Flickr8k(official)
    (text / "Flickr_8k.testImages.txt").unlink()
    (text / "Flickr8k.token.txt").write_text(f"{NAMES[0]}#0\tA dog\n")
    with pytest.raises(MissingDataError, match="testImages"):
        Flickr8k(official, "test")


def test_missing_files(tmp_path):
    with pytest.raises(MissingDataError, match=r"Flickr8k not found.*captions.csv"):
        Flickr8k(tmp_path)
    (tmp_path / "captions.csv").write_text("image,caption\n")
    with pytest.raises(MissingDataError, match="no folder images or Images"):
        Flickr8k(tmp_path)


def coco(folder, **changes):
    content = {
        "images": [{"id": 7, "file_name": NAMES[1]}, {"id": 3, "file_name": NAMES[0]}],
        "annotations": [
            {"id": 100, "image_id": 7, "caption": "A dog."},
            {"id": 101, "image_id": 3, "caption": "A cat\n sits."},
            {"id": 102, "image_id": 7, "caption": "One dog"},
        ],
        **changes,
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return folder / "images", folder / "captions.json"


def test_coco(tmp_path):
    write_images(tmp_path / "images")
    data = CocoCaptions(*coco(tmp_path))
    assert data.captions == [["A cat sits."], ["A dog.", "One dog"]]  # by the images' ids
    assert data[1][0].shape == (3, 16, 21)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"id": 5, "image_id": 1, "caption": "A dog"}]}, "annotation 5: .* image"),
        ({"annotations": [{"id": 5, "image_id": 3, "caption": " . "}]}, "annotation 5: .* empty"),
        ({"annotations": []}, "no captions"),
        ({"annotations": [{"id": 5}]}, "not COCO captions"),
        ({"images": [{"id": 3, "file_name": "gone.jpg"}]}, "there is no image"),
        ({"images": [], "annotations": {}}, "no captions"),
    ],
)
def test_coco_refuses(tmp_path, changes, message):
    write_images(tmp_path / "images")
    if changes.get("images"):
        changes["annotations"] = [{"id": 9, "image_id": 3, "caption": "A dog"}]
    with pytest.raises(DataError, match=message):
        CocoCaptions(*coco(tmp_path, **changes))
    with pytest.raises(MissingDataError):
        CocoCaptions(tmp_path / "images", tmp_path / "nothing.json")


@pytest.mark.skipif(
    not os.environ.get("MINIDL_DATA")
    or not Path(os.environ["MINIDL_DATA"], "flickr8k_1000").is_dir(),
    reason="needs the photographs",
)
def test_the_real_photographs():
    parts = [Flickr8k(split=split) for split in ("train", "val", "test")]
    assert [len(p) for p in parts] == [800, 100, 100]
    assert {len(c) for p in parts for c in p.captions} == {5}
    assert parts[0][0][0].shape[0] == 3
    vocabulary = Vocabulary.build(itertools.chain(*parts[0].captions), min_count=5)
    assert 700 < len(vocabulary) < 1000


# Words ------------------------------------------------------------------------------------


def test_tokenize():
    assert tokenize("A man's T-shirt , and TWO dogs .") == [
        "a",
        "man's",
        "t-shirt",
        "and",
        "two",
        "dogs",
    ]
    assert tokenize(" ... ") == [] and tokenize("Straße 5") == ["straße", "5"]


def test_words():
    v = Vocabulary.build(["a dog", "A dog runs.", "a cat"], min_count=2)
    assert v.tokens == [*SPECIAL, "a", "dog"]
    assert v.encode("The dog, a cat") == [BOS, UNK, 5, 4, UNK, EOS]
    assert v.decode([BOS, 5, 4, EOS, 4, PAD]) == "dog a" and v.decode([UNK]) == "<unk>"
    assert v == Vocabulary.build(["A cat", "a dog runs", "a dog"], min_count=2)  # in any order


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_open_vocabulary_spells_words_that_it_never_read(kind):
    v = Vocabulary.build(["a red star", "a blue star", "two red stars"] * 3, kind, size=290)
    for caption in ("a red star", "two bluestar dares"):
        assert v.decode(v.encode(caption)) == caption
        assert UNK not in v.encode(caption)
    if kind == "bpe":
        assert len(v.encode("red stars")) < len("red stars")
        assert v.decode(v.encode("zürich")) == "zürich"


@pytest.mark.parametrize("kind", ["word", "character", "bpe"])
def test_vocabularies_are_saved(tmp_path, kind):
    v = Vocabulary.build(["a red star", "zwölf"], kind, size=270)
    v.save(tmp_path / "v.json")
    again = Vocabulary.load(tmp_path / "v.json")
    assert again == v and again.encode("zwölf red") == v.encode("zwölf red")
    assert v != Vocabulary.build(["a red star"], kind, size=262)


def test_vocabularies_refuse(tmp_path):
    for call, message in (
        (lambda: Vocabulary.build(["..."]), "no words"),
        (lambda: Vocabulary.build(["a"], min_count=0), "min_count"),
        (lambda: Vocabulary.build(["a"], "letters"), "expected one of word, character, bpe"),
        (lambda: Vocabulary(["a", "a"]), "twice"),
        (lambda: Vocabulary.build(["a"]).encode(" . "), "empty caption"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    (tmp_path / "v.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"v.json: not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


def test_without_tokenizers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"minidl\[captions\]"):
        Vocabulary.build(["a"], "bpe")


# Batches ----------------------------------------------------------------------------------


def scenes_and_words(length=40):
    data = ShapeScenes("train", length)
    return data, Vocabulary.build(itertools.chain(*data.captions))


def test_batches_are_padded_and_sorted():
    data, v = scenes_and_words()
    batch, targets = next(iter(caption_loader(data, v, 8)))
    lengths, words = batch.lengths.numpy(), batch.words.numpy()
    assert (np.diff(lengths) <= 0).all() and words.shape == (8, lengths[0])
    assert batch.images.shape == (8, 3, 64, 64)
    assert (words[:, 0] == BOS).all() and EOS not in words
    assert targets.shape == (lengths.sum(),)
    # Taken apart again, what goes in and what comes out is each caption without its end or start.
    there = np.arange(lengths[0])[:, None] < lengths
    out = np.zeros(there.shape, int)
    out[there] = targets.numpy()
    said = {v.decode(out[: lengths[i], i]) for i in range(8)}
    assert said == set(list(itertools.chain(*data.captions))[:8])
    for i, length in enumerate(lengths):
        assert (words[i, length:] == PAD).all()
        assert list(words[i, 1:length]) == list(out[: length - 1, i]) and out[length - 1, i] == EOS


def test_an_image_comes_once_with_all_its_captions():
    data, v = scenes_and_words()
    loader = caption_loader(data, v, 8, shuffle=True, together=True, seed=0)
    assert len(loader) == 5
    said, seen = [], []
    for batch, targets in loader:
        lengths, of = batch.lengths.numpy(), batch.image_of.numpy()
        assert (np.diff(lengths) <= 0).all() and sorted(set(of)) == list(range(8))
        there = np.arange(lengths[0])[:, None] < lengths
        out = np.zeros(there.shape, int)
        out[there] = targets.numpy()
        for row, image in enumerate(batch.images.numpy()[of]):
            (at,) = [i for i in range(40) if np.array_equal(data[i][0], image)]
            caption = v.decode(out[: lengths[row], row])
            assert caption in data.captions[at]
            said.append((at, caption))
        seen += [image.tobytes() for image in batch.images.numpy()]
    assert len(set(seen)) == 40  # each image once
    assert sorted(said) == sorted((i, c) for i in range(40) for c in data.captions[i])


def test_buckets_have_every_sample_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(3, 30, 1234)
    sampler = BucketSampler(lengths, 16, seed=1)
    first, second = list(sampler), list(sampler)
    for batches in (first, second):
        assert sorted(i for b in batches for i in b) == list(range(1234))
        assert len(batches) == len(sampler) == 78
        padded = sum(lengths[b].max() * len(b) for b in batches)
        assert padded < 1.05 * lengths.sum()
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    with pytest.raises(ValueError, match="batch_size"):
        BucketSampler(lengths, 0)


@pytest.mark.parametrize("bucket", [False, True])
def test_loaders_resume_and_load_in_the_background(bucket):
    data, v = scenes_and_words(20)
    plain = caption_loader(data, v, 8, shuffle=True, bucket=bucket, seed=2)
    expected = [b.words.numpy() for b, _ in plain]
    for options in ({"prefetch_thread": True}, {"num_workers": 2}):
        found = [b.words.numpy() for b, _ in caption_loader(data, v, 8, True, 2, bucket, **options)]
        assert all(map(np.array_equal, expected, found)) and len(found) == len(expected)
    stopped = caption_loader(data, v, 8, shuffle=True, bucket=bucket, seed=2)
    next(iter(stopped))
    resumed = caption_loader(data, v, 8, shuffle=True, bucket=bucket, seed=2)
    resumed.load_state_dict(stopped.state_dict())
    rest = [b.words.numpy() for b, _ in resumed]
    assert len(rest) == len(expected) - 1
    assert all(map(np.array_equal, expected[1:], rest))


def test_augmentation_belongs_to_the_sample_not_to_who_loads_it():
    crop = RandomCrop(64, padding=8)
    data, still = ShapeScenes("train", 12, transform=crop), ShapeScenes("train", 12)
    v = Vocabulary.build(itertools.chain(*data.captions))

    def images(dataset, **options):
        loader = caption_loader(dataset, v, 8, shuffle=True, seed=2, **options)
        return [[b.images.numpy() for b, _ in loader] for _ in range(2)]  # two epochs

    expected = images(data)
    for options in ({"prefetch_thread": True}, {"num_workers": 2}):
        for one, other in zip(expected, images(data, **options)):
            assert all(map(np.array_equal, one, other)) and len(one) == len(other)
    assert not any(map(np.array_equal, expected[0], images(still)[0]))
    # Each caption of an image sees a crop of its own, and another one in the next epoch.
    loaders = caption_loader(data, v, 100, seed=2)
    first, second = (next(iter(loaders))[0].images.numpy() for _ in range(2))
    assert len({image.tobytes() for image in first}) > len(data) and not (first == second).all()


def test_images_of_different_sizes_need_a_transform(table):
    v = Vocabulary.build(["a dog number 0 1"])
    with pytest.raises(ValueError, match=r"Compose\(\[Resize"):
        next(iter(caption_loader(Flickr8k(table, None), v, 4)))
    same = Flickr8k(table, None, Compose([Resize(16), CenterCrop(16)]))
    assert next(iter(caption_loader(same, v, 4)))[0].images.shape == (4, 3, 16, 16)


def test_a_dataset_of_scenes_is_one_for_any_loader():
    assert isinstance(next(iter(DataLoader(ShapeScenes("val", 4), 4, collate_fn=list))), list)


def test_the_same_scenes_in_another_process():
    code = (
        "from minidl.data import ShapeScenes; import zlib;"
        "print(zlib.crc32(ShapeScenes('test', 5)[4][0].tobytes()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == zlib.crc32(ShapeScenes("test", 5)[4][0].tobytes())
