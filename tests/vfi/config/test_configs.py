"""Settings: presets, flags as published, cross-field rules, and the way to a file and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vfi.config import command_line, presets
from vfi.config.configs import Config, ConfigError, RunConfig, accumulation, folder_ratio
from vfi.config.validation import validate
from vfi.io.dataclass_json import config_from_json, to_json


def parse(line: str) -> Config:
    return command_line.from_command_line(line.split())


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_valid_and_survive_a_file(name):
    config = presets.get(name)
    assert config.run.preset == name
    assert config_from_json(to_json(config)) == config
    validate(config)
    assert dataclasses.replace(parse(f"--preset {name}"), run=config.run) == config


def test_a_preset_is_found_however_it_is_typed():
    for name in ("Exp-1a", "exp_1a", "EXP-1A"):
        config = parse(f"--preset {name}")
        assert (config.run.preset, config.run.exp_name, config.model.backbone_mode) == (
            "Exp-1a",
            "Exp-1a_phase1",
            "mamba2_only",
        )


def test_ablations_differ_from_small_as_they_say():
    """Every ablation that names a difference has one, and only in the fields that it names."""
    plain = dataclasses.asdict(presets.small())
    for name, changes in presets.ABLATIONS.items():
        config = dataclasses.asdict(presets.get(name))
        differences = {
            field: value for group in config for field, value in config[group].items() if value != plain[group][field]
        }
        assert differences == {"preset": name} | {k: v for k, v in changes.items() if k != "warp" or v != "feature"}


def test_override_refuses_an_unknown_field():
    with pytest.raises(ConfigError, match="no setting is named widht"):
        presets.override(presets.small(), widht=3)


def test_flags_take_underscore_and_hyphen():
    one = parse("--preset tiny --batch_size 3 --no-use_ecab --exp_name x --backbone_mode mamba2_only --lr 1e-3")
    other = parse("--preset tiny --batch-size 3 --no-use-ecab --exp-name x --backbone-mode mamba2_only --lr 1e-3")
    assert one == other
    assert (one.data.batch_size, one.model.use_ecab, one.model.backbone_mode, one.optim.lr) == (3, False, "mamba2_only", 1e-3)
    assert one.model.width == presets.tiny().model.width


def test_use_mhc_is_a_kind_of_mixing():
    assert command_line.expand_aliases(["--use-mhc", "--lr", "1"]) == ["--mixing", "mhc", "--lr", "1"]
    assert command_line.expand_aliases(["--no-use_mhc", "-", "a--b"]) == ["--mixing", "none", "-", "a--b"]
    assert parse("--no-use_mhc").model.mixing == "none"


def test_several_folders():
    data = parse("--data_path A B --mixed_ratio 2:1 --sequence middle random_gap --remainder pad").data
    assert (data.data_path, folder_ratio(data), data.sequence) == (("A", "B"), (2, 1), ("middle", "random_gap"))
    assert folder_ratio(parse("--data_path A").data) == (1,)


@pytest.mark.parametrize(
    ("flags", "folders"),
    [
        ("--data_path A --x4k_path B", ("A", "B")),
        ("--x4k-path B --data-path A --mixed_ratio 2:1", ("A", "B")),
        ("--data_path=A --lr 1e-4 --x4k_path=B --mixed_ratio 2:1", ("A", "B")),
        ("--data_path A C --x4k_path B --mixed_ratio 2:1:1 --sequence middle", ("A", "C", "B")),
        ("--x4k_path B", ("B",)),
    ],
)
def test_x4k_path_is_the_last_folder(flags, folders):
    ratio = [] if "ratio" in flags or len(folders) == 1 else ["--mixed_ratio", "1:1"]
    assert parse(" ".join([flags, *ratio])).data.data_path == folders


def test_run_has_a_name():
    assert parse("--preset base").run.exp_name == "base_phase1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 5 --epochs 2", "--steps 5 and --epochs 2 were both given"),
        ("--batch_size 0", "--batch_size is 0; it must be at least 1"),
        ("--crop 100", "--crop is 100; it must be a multiple of 16"),
        ("--crop 48", "at least 64"),
        ("--num_workers -1", "--num_workers is -1"),
        ("--augment_prob 1.5", "between 0 and 1"),
        ("--lr 1e-5", "--lr_min"),
        ("--data_path A B C --mixed_ratio 1:1:1 --small_frames upscale refuse", "--small_frames has 2 entries"),
        ("--vgg_weight -1", "--vgg_weight is -1.0; it must not be negative"),
        ("--style_weight -1", "--style_weight is -1.0; it must not be negative"),
        ("--vgg_weights here.pth", "--vgg_weights here.pth has no effect without --vgg_weight or --style_weight"),
        ("--head_dim 24", "--head_dim 24 must divide"),
        ("--exp_name a/b", "plain folder name"),
        ("--preset huge", "choose from tiny, small, base"),
        ("--scale 0.3", "choose from 1.0, 0.5, 0.25"),
        ("--scale 0.25", "--scale 0.25 has no effect without --phase 2 or 3"),
        ("--warp image", "--warp image has no effect without --phase 2 or 3"),
        ("--freeze_backbone 50", "--freeze_backbone 50 has no effect without --phase 2 or 3"),
        ("--curriculum_T 30", "--curriculum_T 30 has no effect without --curriculum"),
        ("--curriculum_crops 64 60 96", "--curriculum_crops is 60"),
        ("--mixing_streams 2", "--mixing_streams 2 has no effect without --mixing"),
        ("--sinkhorn_iterations 5", "has no effect without --mixing mhc"),
        ("--mhc_anneal 0.5", "has no effect without --mixing"),
        ("--mhc_anneal 1.5", "between 0 and 1"),
        ("--xb_share 3", "--xb_share 3 must divide the 8 heads"),
        ("--depths 0 1", "each stage needs at least one block"),
        ("--val_samples 5", "--val_samples 5 has no effect without --val_path"),
        ("--ssd_precision input --ssd_backend reference", "has no effect without a --ssd_backend with kernels"),
        ("--xb_share 2", "needs --ssd_groups per_head"),
        ("--backbone_mode mamba2_only --gate off", "--gate off has no effect without a --backbone_mode with attention"),
        ("--backbone_mode gated_attn_only --scan flip", "--scan flip has no effect without a --backbone_mode with a scan"),
        ("--matvlm_plan A", "--matvlm_plan A needs --matvlm_donor"),
        ("--matvlm_plan A --matvlm_donor x --resume y", "--matvlm_plan A and --resume y both give the initial weights"),
        ("--matvlm_plan A --matvlm_donor x --start_from y", "--matvlm_plan A and --start_from y both give the initial weights"),
        ("--resume x --start_from y", "--resume x and --start_from y both give the initial weights"),
        ("--keep_best -1", "--keep_best is -1"),
        ("--keep_best 2", "--keep_best 2 has no effect without --val_path"),
        ("--profile -1", "--profile is -1; it must not be negative"),
        ("--profile 2 --dry_run", "--profile 2 has no effect without --no-dry_run"),
        ("--ema 1", "--ema is 1.0; it is a decay such as 0.999"),
        ("--ema -0.1", "--ema is -0.1"),
        ("--data_path A B", "--data_path has 2 folders and there is no --mixed_ratio: give one number for each folder, such as "
         "--mixed_ratio 1:1"),
        ("--data_path A --mixed_ratio 2:1", "--data_path has 1 folder and there is --mixed_ratio 2:1"),
        ("--data_path A B C --mixed_ratio 2:1", "give one number for each folder, such as --mixed_ratio 1:1:1"),
        ("--mixed_ratio 2", "--mixed_ratio is '2'; it must be numbers from 1 to 100 such as 2:1"),
        ("--mixed_ratio 2:0", "--mixed_ratio is '2:0'"),
        ("--mixed_ratio 2:x", "--mixed_ratio is '2:x'"),
        ("--data_path A --sequence middle random_gap", "--sequence has 2 entries and --data_path 1"),
        ("--lane_bundle 0", "--lane_bundle is 0; it must be at least 1"),
        ("--matvlm_donor x", "--matvlm_donor x has no effect without --matvlm_plan"),
    ],
)  # fmt: skip
def test_bad_value_names_field_and_fix(flags, message):
    with pytest.raises(ConfigError) as error:
        parse(flags)
    assert message in str(error.value)


@pytest.mark.parametrize("flags", ["--no_such_flag 1", "--phase 4", "--backbone_mode cnn", "--batch_size three"])
def test_unknown_flag_or_value_ends_the_command(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse(flags)
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert flags.split()[0].lstrip("-").replace("_", "-") in (printed.out + printed.err).replace("_", "-")


def test_accumulation_is_derived_and_a_remainder_refused():
    config = parse("--batch_size 4 --global_batch 24")
    assert [accumulation(config, processes) for processes in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert accumulation(parse("--batch_size 4"), 8) == 1
    with pytest.raises(ConfigError, match=r"--global_batch 24 is not a multiple .* = 20: use --global_batch 20"):
        accumulation(config, 5)
    with pytest.raises(ConfigError, match="use --global_batch 32"):
        accumulation(config, 8)


def broken(change) -> str:
    content = json.loads(to_json(Config()))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(new=1), r"model: .* a newer one\? Unknown fields: \['new'\]"),
        (lambda c: c["model"].update(width="16"), "model: width is '16'"),
        (lambda c: c["model"].update(gate="always"), "gate is 'always'"),
        (lambda c: c["model"].update(depths=[3]), "depths"),
        (lambda c: c["data"].update(data_path="A"), "data_path is 'A'"),
        (lambda c: c["data"].update(sequence=["middle", "last"]), r"sequence\[1\] is"),
        (lambda c: c.update(run=[]), "run: expected an object"),
    ],
)
def test_damaged_file_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_json(broken(change), "runs/x/config.json")
    with pytest.raises(ConfigError, match="is not JSON"):
        config_from_json("{")


def test_what_an_older_program_lacked_has_its_default_and_is_said(capsys):
    older = broken(lambda c: (c["run"].pop("keep_best"), c["optim"].pop("ema"), c.pop("guard"), c["model"].update(width=24)))
    config = config_from_json(older, "runs/x/config.json")
    assert config == dataclasses.replace(Config(), model=dataclasses.replace(Config().model, width=24))
    note = "note: runs/x/config.json is older than these settings, which have their defaults: guard, keep_best, ema\n"
    assert capsys.readouterr() == ("", note)
    config_from_json(to_json(Config()))
    config_from_json(older, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config().model)])
def test_every_setting_of_the_model_has_a_default_for_older_runs(field):
    config = config_from_json(broken(lambda c: c["model"].pop(field)), quiet=True)
    assert config == Config()


def test_ints_are_taken_where_floats_are_meant():
    config = config_from_json(broken(lambda c: c["optim"].update(lr=1)))
    assert config.optim.lr == 1
    with pytest.raises(ConfigError):
        config_from_json(broken(lambda c: c["run"].update(seed=True)))
    assert config_from_json(broken(lambda c: c["run"].update(steps=7))).run == dataclasses.replace(RunConfig(), steps=7)
