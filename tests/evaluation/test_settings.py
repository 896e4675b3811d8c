"""What jobs/promote.py refuses of its settings."""

from typing import Any

import pytest

from leafnet.core.errors import UserError
from leafnet.core.settings import compile_pattern, validate
from leafnet.evaluation.settings import PromoteSettings

WHOLE: dict[str, Any] = {"registry": "models", "candidate": "runs/a/model", "shards": "shards"}


@pytest.mark.parametrize(
    "share", ["0", "1", "0.9", ".9", "0.05", "1.0", "1.00"], ids=lambda text: str(text)
)
def test_a_recall_is_a_share(share: str) -> None:
    wanted = (f"late_blight={share}",)
    assert validate(PromoteSettings, WHOLE | {"recall": wanted}).recall == wanted


@pytest.mark.parametrize(
    "wrong", ["rust=2", "rust=1.1", "rust=-0.5", "rust=x", "rust=", "rust=.", "0.9", "1", "rust"]
)
def test_another_recall_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"CLASS=SHARE with a share from 0 to 1, got ") as caught:
        validate(PromoteSettings, WHOLE | {"recall": ("blight=0.5", wrong)})
    assert f"got {wrong}" in str(caught.value)


@pytest.mark.parametrize("missing", ["candidate", "shards"])
def test_a_promotion_needs_a_model_and_a_data_set(missing: str) -> None:
    with pytest.raises(UserError, match=r"give --candidate MODEL and --shards DATA, or --rollback"):
        validate(PromoteSettings, {name: WHOLE[name] for name in WHOLE if name != missing})
    assert validate(PromoteSettings, WHOLE).candidate == WHOLE["candidate"]


def test_a_rollback_needs_neither_and_takes_no_candidate() -> None:
    back = {"registry": "models", "rollback": True}
    assert validate(PromoteSettings, back).rollback
    assert validate(PromoteSettings, back | {"shards": "shards"}).rollback
    with pytest.raises(UserError, match=r"--rollback takes no --candidate"):
        validate(PromoteSettings, back | {"candidate": "runs/a/model"})


def test_a_pattern_that_is_none_is_refused_with_its_flag() -> None:
    assert compile_pattern(r"(\d+)", flag="--group").groups == 1
    with pytest.raises(UserError, match=r"--group '\(' is not a regular expression: ") as caught:
        compile_pattern("(", flag="--group")
    assert caught.value.reason == "bad-regex"
