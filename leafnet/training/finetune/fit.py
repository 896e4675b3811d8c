"""Fine-tuning: the last stages of the network and the head, on augmented photographs.

The head was fitted on frozen features before (linear probing, then fine-tuning: Kumar et al. 2022,
arXiv:2202.10054): a head that starts at random would pull the features out of shape. What is judged
and published is the average of the weights over steps (EMA).

The rate is relative to each variable's root mean square, as in Adafactor, and lower the further a
stage is from the head. BatchNorm is folded into the kernels, whose scales then differ by a factor
of 6 within a stage and 40 between stages: with one rate for all, a step of AdamW at 3e-4 was 6 % of
some kernels and 0.1 % of others, and the first epoch ruined the features.

`fine_tune` runs in every worker. Order, views and mixing are functions of the seed and the
position, and gradients are summed over the workers before they are clipped, so that all take the
same steps. What is trained is in `finetune.tuner`, and the loop is `training.loop`.
"""

import time
from collections.abc import Callable
from contextlib import closing

import numpy as np

from leafnet.core.errors import UserError
from leafnet.distributed.worker import Hooks, Place
from leafnet.models import runtime
from leafnet.models.classifier import Head
from leafnet.training import loop
from leafnet.training.finetune.pixels import Photographs
from leafnet.training.finetune.state import Convolutions, TuneState
from leafnet.training.finetune.tuner import Tuner, TuningData, mixes
from leafnet.training.loop import Report, Saving, Steps
from leafnet.training.settings import FineTuneSettings


def fine_tune(
    data: TuningData,
    *,
    weights: Convolutions,
    head: Head,
    settings: FineTuneSettings,
    class_weights: str,
    precision: str,
    image_size: int,
    num_classes: int,
    seed: int,
    place: Place,
    report: Report,
    advance: Callable[[int], None],
    saving: Saving[TuneState] | None = None,
    hooks: Hooks | None = None,
    state: TuneState | None = None,
) -> TuneState:
    """Train the last stages and the head under `tf.distribute`, also from inside an epoch.

    Args:
        data: the same on every worker.
        weights: of the whole network, folded.
        head: fitted, on standardised features.
        settings: `batch_size` is the global batch.
        class_weights: `none` or `balanced`, as the head was fitted.
        precision: of convolutions.
        image_size: of the photographs, and what validation and the published network look at.
        num_classes: C.
        seed: of order, views and mixing.
        place: of this worker.
        report: called after each epoch.
        advance: called with counts of examples of the global batch.
        saving: when and how the state is saved; none: never.
        hooks: how it is followed, and asked to stop.
        state: to go on from.

    Returns:
        The state after the last epoch, on every worker.

    Raises:
        UserError: the loss is not finite, with the steps; a batch that cannot be shared out.
        Leaving: on every worker, after one was asked to leave and the state was saved.
    """
    hooks = hooks or Hooks()
    # They may still be decoding on other machines.
    hooks.long("building the network, which waits for the other workers")
    examples = data.train.labels.size
    check_batch(settings, examples=examples, workers=place.workers)
    steps = Steps.of(examples, settings.batch_size, settings.epochs)
    tuner = Tuner(
        data,
        weights=weights,
        head=head,
        settings=settings,
        class_weights=class_weights,
        precision=precision,
        image_size=image_size,
        num_classes=num_classes,
        seed=seed,
        place=place,
        steps=steps,
        advance=advance,
    )
    if state:
        tuner.restore(state)
    else:
        state = tuner.state()
        if tuner.valid_examples:
            mine = loop.validate(tuner, "the head alone", hooks, may_leave=False)
            loss, correct = tuner.workers.sum(np.array(mine[:2], np.float64)).tolist()
            state.head_alone = loop.scores(tuner, loss, correct)
            state.best_loss = state.head_alone["valid_loss"]
    advance(state.step * steps.batch)
    with closing(runtime.ahead(tuner.batches(state.step), depth=3)) as tuner.feed:
        return loop.fit(
            tuner,
            state,
            steps=steps,
            patience=settings.patience,
            report=report,
            saving=saving,
            hooks=hooks,
            first_piece=1,
        )


def check_batch(settings: FineTuneSettings, *, examples: int, workers: int) -> None:
    """Refuse a global batch that the workers cannot share out.

    Raises:
        UserError: there are too few examples for each worker, or pairs would be cut.
    """
    batch, pairs = min(settings.batch_size, examples), mixes(settings)
    if batch < workers or (pairs and batch % (2 * workers)):
        wanted = f"a multiple of {2 * workers}" if pairs else f"at least {workers}"
        raise UserError(
            "batch-too-small",
            f"a global batch of {batch} cannot be shared out among {workers} workers"
            + (", whose examples are mixed in pairs" if pairs else "")
            + f"; give {wanted} with --fine_tune.batch_size",
        )


def measured_rate(
    *,
    weights: Convolutions,
    head: Head,
    settings: FineTuneSettings,
    precision: str,
    image_size: int,
    steps: int,
    seconds: float,
) -> float:
    """Examples a second that one worker learns from by itself, on blank photographs.

    Args:
        weights: of the whole network, folded.
        head: of the shape that the run's will have.
        settings: `batch_size` is what the worker has of a global batch.
        precision: of convolutions.
        image_size: of the photographs.
        steps: taken at most after the first, which compiles.
        seconds: that they take, more or less.
    """
    batch = settings.batch_size
    blank = np.zeros((batch, image_size, image_size, 3), np.uint8)
    data = Photographs(np.zeros(batch, np.int32), lambda rows: blank[rows])
    width = head[0][0].shape[0]
    tuner = Tuner(
        TuningData(data, data, np.zeros(width, np.float32), np.ones(width, np.float32)),
        weights=weights,
        head=head,
        settings=settings.model_copy(update={"epochs": 1 + steps}),
        class_weights="none",
        precision=precision,
        image_size=image_size,
        num_classes=head[-1][1].size,
        seed=0,
        place=Place(0, 1),
        steps=Steps(batch, 1, 1 + steps),
    )
    tuner.feed = tuner.batches(0)
    tuner.train(0, 1)
    began, taken = time.monotonic(), 0
    while taken < steps and (taken == 0 or time.monotonic() - began < seconds):
        tuner.train(1 + taken, 1)
        taken += 1
    return taken * batch / (time.monotonic() - began)
