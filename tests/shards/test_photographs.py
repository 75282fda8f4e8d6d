"""Test that photographs of a folder are found at any depth, assigned by name and downscaled, and that faults are reported."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sources import texture, write_frames

from shards import photographs
from shards.photographs import Deck, Survey, deal, digest_of, longest_side, read, survey
from shards.schema import ShardError


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_are_found_at_any_depth_and_faults_are_named(tmp_path):
    save(tmp_path / "a.png", texture(0))
    save(tmp_path / "deep" / "er" / "b.JPG", texture(1))
    save(tmp_path / "c.webp", texture(2))
    save(tmp_path / "icon.png", texture(3)[:20, :20])
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "deep" / "er" / "b.JPG").read_bytes()[:300])
    (tmp_path / "note.txt").write_text("no picture")
    found = survey(tmp_path)
    assert sorted(found.digests) == ["a.png", "c.webp", "deep/er/b.JPG"]
    assert not found.cutouts
    assert sorted(found.faults) == ["broken.jpg", "icon.png"]
    assert "broken.jpg" in found.faults["broken.jpg"]
    assert "below 64" in found.faults["icon.png"]


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ShardError, match="not a folder"):
        survey(tmp_path / "absent")
    with pytest.raises(ShardError, match="no picture to use"):
        survey(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no png")
    with pytest.raises(ShardError, match="1 with faults"):
        survey(tmp_path)


def test_splits_share_nothing_and_new_names_move_no_others():
    def among(count):
        return Survey({f"{number}.jpg": "" for number in range(count)}, frozenset({"0.jpg"}), {})

    train, val = deal(among(400), "train"), deal(among(400), "val")
    assert sorted(train + val) == sorted(among(400).digests)
    assert 20 < len(val) < 60
    assert set(deal(among(300), "val")) == set(val) & set(among(300).digests)
    with pytest.raises(ShardError, match="split val"):
        deal(Survey(dict.fromkeys(train[:5], ""), frozenset(), {}), "val")
    with pytest.raises(ShardError, match="split train"):
        deal(among(1), "train")


def test_the_digest_depends_on_names_and_bytes(tmp_path):
    write_frames(tmp_path / "one", [texture(0), texture(1)])
    write_frames(tmp_path / "two", [texture(0), texture(1)])
    write_frames(tmp_path / "three", [texture(0), texture(2)])
    one, two, three = (survey(tmp_path / name).digests for name in ("one", "two", "three"))
    assert digest_of(one, sorted(one)) == digest_of(two, sorted(two))
    assert digest_of(one, sorted(one)) != digest_of(three, sorted(three))
    assert digest_of(one, sorted(one)) != digest_of(one, sorted(one)[:1])


def test_large_pictures_are_shrunk_without_aliases(tmp_path):
    stripes = np.zeros((600, 900, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the smaller copies can show: they must be grey
    picture = read(save(tmp_path / "stripes.png", stripes), 450)
    assert [level.shape[:2] for level in picture.levels] == [(300, 450), (150, 225), (75, 113)]
    for level in picture.levels:
        assert np.abs(level[4:-4, 4:-4].astype(int) - 127).max() < 12


def test_cutouts_are_cropped_and_hide_no_colour(tmp_path):
    pixels = np.full((200, 300, 4), 255, np.uint8)
    pixels[..., 3] = 0
    pixels[50:150, 100:240] = (200, 100, 50, 255)
    picture = read(save(tmp_path / "thing.png", pixels), 512)
    assert picture.is_cutout
    assert picture.size == (100, 140)
    assert (picture.levels[0] == (200, 100, 50, 255)).all()
    assert not read(save(tmp_path / "opaque.png", np.full((80, 80, 4), 255, np.uint8)), 512).is_cutout


def test_a_deck_that_is_too_large_is_dealt_by_blocks(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{number}.png", np.full((70, 70, 3), number, np.uint8)) for number in range(20)]
    monkeypatch.setattr(photographs, "MEMORY", 10 * (70 * 70 * 2 // 3) * 4)

    def colours(deck, number):
        return [int(picture.levels[0][0, 0, 0]) for picture in deck.pictures(3, number)]

    deck = Deck(paths, 70)
    first, second = colours(deck, 0), colours(deck, photographs.BLOCK)
    assert len(first) == len(second) == 10
    assert first != second
    assert colours(deck, photographs.BLOCK - 1) == first == colours(Deck(paths, 70), 5)
    assert len(colours(Deck(paths[:9], 70), 0)) == 9


def test_photographs_are_as_large_as_frames_need():
    assert longest_side(128, 128) == 1024
    assert longest_side(1080, 1920) == 3840
    assert longest_side(2160, 4096) == 4096
