"""Numbers of shards that do not go together."""

from kd_lightning.cli.cache import check_shard
from tests.unit.bad_input.case import Case


def _message(num_shards: object, shard: object) -> str:
    return (
        "--num_shards says into how many parts a build is divided and --shard which one this is, from 0, got "
        f"num_shards={num_shards} and shard={shard}. Give both, such as --num_shards 8 --shard $SLURM_ARRAY_TASK_ID; "
        "neither puts the parts together."
    )


CASES = [
    Case(
        f"{count} shards, number {number}",
        lambda c=count, n=number: check_shard(c, n),
        ValueError,
        _message(count, number),
    )
    for count, number in [(8, None), (1, 0), (2, 2), (2, -1), (0, None)]
]
