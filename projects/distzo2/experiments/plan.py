"""Tables "plan" and "sizes", figure "plan": what the cost model predicts for GPUs, up to 175
billion parameters. Nothing is measured.

Rates are shares that we assume of the datasheets' (`cost_model.gpu_rates`). Two comparisons with
ZO2 on one GPU: the same batch on each GPU (with twice the GPUs twice the tokens a step), and the
same global batch.
"""

from typing import Literal

from pydantic import Field

from projects.distzo2.cost_model import Plan, busiest, gpu_rates
from projects.distzo2.labels import BATCH_A_GPU, BATCH_IN_ALL, OWN_LINK, SHARED_LINK
from projects.distzo2.plan import ITEMSIZE, meshes
from projects.distzo2.shapes import shape_of
from shared import experiment
from shared.models.shapes import OPT_SHAPES


class Config(experiment.Config):
    models: list[Literal[tuple(OPT_SHAPES)]] = Field(min_length=1)  # type: ignore[valid-type]
    """OPT's shapes by name"""
    counts: list[int] = Field(min_length=1)
    """numbers of GPUs"""
    gpus: list[str] = Field(min_length=1)
    """kinds of GPU by their names in hardware.csv"""
    tokens: int = Field(ge=1)
    """of a sequence"""
    global_batch: int = Field(ge=1)
    """sequences of a step"""


def run(config: Config, run: experiment.Run) -> None:
    one, one_batch, all_batches = (
        Plan(),
        [(1, config.tokens)],
        [(1, config.tokens)] * config.global_batch,
    )
    for model in run.progress(config.models, "models"):
        shape = shape_of(model)
        for gpu in config.gpus:
            rates = gpu_rates(gpu, 1)
            alone = {
                work: one.tokens_per_second(shape, rates, b, ITEMSIZE)
                for work, b in ((BATCH_A_GPU, one_batch), (BATCH_IN_ALL, all_batches))
            }
            for count in config.counts:
                for mode, (dp, pert) in meshes(count).items():
                    for links, crowd in ((OWN_LINK, None), (SHARED_LINK, 1)):
                        rates = gpu_rates(gpu, count, links=crowd)
                        for transfer in ("replicated", "sliced"):
                            plan = Plan(dp, pert, transfer)
                            for work, batches in (
                                (BATCH_A_GPU, one_batch * dp),
                                (BATCH_IN_ALL, all_batches),
                            ):
                                lanes = plan.lanes(shape, rates, batches, ITEMSIZE)
                                busy = lanes.upload + lanes.exchange + lanes.compute + lanes.offload
                                speed = plan.tokens_per_second(shape, rates, batches, ITEMSIZE)
                                run.row(
                                    model=model, gpu=gpu, gpus=count, mode=mode, links=links,
                                    transfer=transfer, same_batch=work,
                                    tokens_per_second=speed, speedup_ratio=speed / alone[work],
                                    compute_share=lanes.compute / busy,
                                    upload_share=lanes.upload / busy,
                                    exchange_share=lanes.exchange / busy,
                                    offload_share=lanes.offload / busy,
                                    host_bytes=plan.host_bytes(shape, ITEMSIZE),
                                    exchanged_bytes=plan.exchanged_bytes(shape, ITEMSIZE),
                                    device_bytes=plan.device_bytes(shape, ITEMSIZE, rates.draws),
                                    busiest=busiest(lanes, shape.blocks),
                                )  # fmt: skip
