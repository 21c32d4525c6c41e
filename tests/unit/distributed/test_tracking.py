"""A tracker is there before the run begins, and shows the run as one."""

import pytest
from accelerate import tracking as accelerates

from scale_sft.distributed.tracking import refuse_unknown_tracker
from scale_sft.errors import UserError


def test_a_misspelt_tracker_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="^tracker: unknown 'tensorbord'; did you mean 'tensorboard'"):
        refuse_unknown_tracker("tensorbord")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(accelerates, "_available_trackers", [])
    with pytest.raises(UserError, match="^tracker: got 'wandb', which is not installed. Fix: pip install wandb"):
        refuse_unknown_tracker("wandb")


@pytest.mark.parametrize("name", [None, "all", "tensorboard"])
def test_what_can_track_is_accepted(name):
    refuse_unknown_tracker(name)


def test_tensorboard_shows_one_run_with_its_settings_and_losses(train_run, pairs_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_run(tracker="tensorboard", steps=2, eval_data=str(pairs_file))
    files = [path for path in (run / "tracker").rglob("*") if path.is_file()]
    assert len(files) == 1
    events = EventAccumulator(str(files[0].parent)).Reload()
    assert {"train/loss", "eval/loss"} <= set(events.Tags()["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata
