"""What a run is to do and on what, decided once: the dry run prints it, the run does it."""

from dataclasses import dataclass

from leafnet.core import storage
from leafnet.core.terminal import say
from leafnet.data.shards import SPLITS, ShardIndex
from leafnet.distributed import resources
from leafnet.distributed.resources import Machines, Node
from leafnet.evaluation.predict import choose_precision
from leafnet.features import cache as features_cache
from leafnet.models.weights import Weights
from leafnet.training.finetune import fit as finetune_fit
from leafnet.training.head import fit as head_fit
from leafnet.training.loop import Steps
from leafnet.training.settings import TrainSettings, describe_stages


@dataclass(frozen=True)
class Plan:
    """What a run is to do, as it is known before a machine is taken."""

    settings: TrainSettings  # with absolute paths
    index: ShardIndex
    weights: Weights

    @property
    def url(self) -> str:
        """Folder or URL of the run."""
        return storage.join(self.settings.out, self.settings.name)

    @property
    def cache(self) -> str:
        """Folder or URL of the features of all networks."""
        settings = self.settings
        return storage.absolute(settings.cache.url or storage.join(settings.out, "features"))

    @property
    def views(self) -> int:
        """Views of each training image in the cache."""
        # Without augmentation all views are the plain one.
        return self.settings.views if self.settings.augment else 1

    @property
    def head_steps(self) -> Steps:
        """The steps of the head's fit."""
        head = self.settings.head
        return Steps.of(self.index.examples("train"), head.batch_size, head.epochs)

    @property
    def tuning_steps(self) -> Steps:
        """The steps of fine-tuning, if there is any."""
        tuning = self.settings.fine_tune
        return Steps.of(self.index.examples("train"), tuning.batch_size, tuning.epochs)

    def features_of(self, weights: Weights, *, precision: str, views: int) -> features_cache.Plan:
        """What the cache has and lacks of the features of the network with `weights`."""
        key = features_cache.cache_key(
            weights_fingerprint=weights.fingerprint,
            image_size=self.settings.image_size,
            precision=precision,
        )
        wanted = [(shard, views if shard.split == "train" else 1) for shard in self.index.shards]
        return features_cache.plan(storage.join(self.cache, key), wanted, seed=self.settings.seed)


@dataclass(frozen=True)
class Resources:
    """What a run computes on, and how."""

    nodes: list[Node]
    machines: Machines  # how the frozen network is spread over them
    workers: int | tuple[int, int]  # of Ray Train: how many, or the fewest and the most
    cpus_per_worker: float
    precision: str  # of the backbone
    why_precision: str
    batch_size: int  # views in a pass of the backbone

    @property
    def gpu(self) -> bool:
        """True on GPUs."""
        return self.machines.gpus > 0

    @property
    def fewest_workers(self) -> int:
        """Of a range the fewest."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Of a range the most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def threads_per_worker(self) -> int:
        """Of each worker of Ray Train."""
        return max(1, round(self.cpus_per_worker))


def allocate(plan: Plan, nodes: list[Node]) -> Resources:
    """Decide what the run computes on, of a cluster of `nodes`.

    Raises:
        UserError: there are fewer GPUs than asked for, or a batch that the workers cannot share.
    """
    settings = plan.settings
    machines = resources.machines(nodes, settings.gpu)
    workers, cpus = resources.workers_for(nodes, settings.workers, machines.gpus)
    precision, why = choose_precision(
        settings.precision,
        plan.weights.convolutions,
        image_size=settings.image_size,
        machines=machines,
    )
    chosen = Resources(
        nodes,
        machines,
        workers,
        cpus,
        precision,
        why,
        resources.batch_size(settings.batch_size, gpus=machines.gpus),
    )
    head_fit.check_batch(plan.head_steps.batch, workers=chosen.fewest_workers)
    if settings.fine_tune.blocks:
        examples = plan.index.examples("train")
        finetune_fit.check_batch(settings.fine_tune, examples=examples, workers=chosen.most_workers)
    return chosen


def say_data(plan: Plan) -> None:
    """Print what is learnt from, and with which network."""
    index, settings = plan.index, plan.settings
    counts = "/".join(f"{index.examples(split):,}" for split in SPLITS)
    size = sum(shard.bytes for shard in index.shards)
    say(
        f"data      {counts} images for train/valid/test, {len(index.class_names)} classes, "
        f"{len(index.shards):,} shards of {size / 1e6:,.1f} MB in all"
    )
    note = ": a check of the pipeline, not of accuracy" if settings.weights == "random" else ""
    say(f"backbone  ResNet50, {settings.weights} weights{note}, {settings.image_size} pixels")


def say_work(plan: Plan, chosen: Resources) -> None:
    """Print what it computes on, and the steps that it takes."""
    say(
        f"device    {resources.device(chosen.machines.gpus)}, {chosen.precision} "
        f"({chosen.why_precision})"
    )
    steps = plan.head_steps
    say(f"head      {_described(steps)}; {shared_out(steps.batch, chosen.workers)}")
    if plan.settings.fine_tune.blocks:
        steps = plan.tuning_steps
        say(
            f"fine-tune {describe_stages(plan.settings.fine_tune.blocks)}, {_described(steps)}; "
            f"{shared_out(steps.batch, chosen.workers)}"
        )


def _described(steps: Steps) -> str:
    return f"{steps.epochs} epochs of {steps.per_epoch:,} steps = {steps.total:,}"


def shared_out(batch: int, workers: int | tuple[int, int]) -> str:
    """How a global batch is shared by some workers, or by a range of them.

    >>> shared_out(32, 2), shared_out(32, (1, 4))
    ('global batch 32, 16 on each of 2 workers', 'global batch 32, on 1 to 4 workers')
    """
    if isinstance(workers, tuple):
        return f"global batch {batch}, on {workers[0]} to {workers[1]} workers"
    each = f"{batch / workers:g} on each of {workers} worker{'s' * (workers > 1)}"
    return f"global batch {batch}, {each}"
