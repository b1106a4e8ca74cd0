"""Times of the students of one comparison and of their original, in turns in one process, as they are shipped."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.accuracy.jobs import Workshop, jobs
from benchmarks.accuracy.networks import Case
from benchmarks.accuracy.page import subject
from benchmarks.methods import times
from benchmarks.methods.times import Time
from benchmarks.speed.timing import Effort
from benchmarks.trainings import STUDENT
from dyncompress.bundle import load
from dyncompress.conversion import convert, plan_of
from dyncompress.cost import count_params, measure_macs
from dyncompress.folding import fold
from dyncompress.prediction import unchanged


def race(workshop: Workshop, case: Case, effort: Effort) -> Iterator[Time]:
    """Rows of every arm that has a student of the first seed; none where no arm has.

    Args:
        workshop: Where students are.
        case: The comparison.
        effort: How long to measure.
    """
    own = [job for job in jobs([case]) if job.seed == case.seeds[0] and (workshop.place(job) / STUDENT).exists()]
    if not own:
        return
    nets = {job.arm.title: load(workshop.place(job) / STUDENT, job.network.untrained()) for job in own}
    network = own[0].network
    plan = plan_of(nets[own[0].arm.title])
    assert plan is not None
    nets = {"original": convert(network.untrained(), unchanged(plan.graph)), **nets}
    costs = {title: (measure_macs(net, network.example), count_params(net)) for title, net in nets.items()}
    folded = {title: fold(net) for title, net in nets.items()}
    name = subject(case.network, case.budget, case.epochs)
    yield from times.race(folded, network.example, name, costs, effort, network.batches)
