"""A process of an elastic run: it joins, trains in one view after another, and leaves."""

import importlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from consensus.comm import (
    LEAVING,
    LOST,
    PLANNED,
    Group,
    GroupError,
    Launch,
    Members,
    PeerLostError,
    Solo,
    Store,
    StoreLostError,
    View,
    connect_to_launcher,
    open_view,
    read_text,
)
from consensus.problem import SampleError
from consensus.run.checkpoint.directory import JoinedDirectory
from consensus.run.checkpoint.resume import find_origin, require_same
from consensus.run.checks import ConfigError, require
from consensus.run.compose import to_config
from consensus.run.config import Config
from consensus.run.continued import completed
from consensus.run.elastic.trainer import ElasticTrainer
from consensus.run.limits import MachineError, machine_failures
from consensus.run.plan import Plan, make_plan, set_determinism
from consensus.run.signals import TRY_AGAIN, RunStopped, StopSignals
from consensus.stored_config import parse_config, to_text

MEET_S = 60.0  # longest wait for the store at the start

OWN = ("device", "data.root", "data.loader_workers")
"""Keys that may differ between the members of a run."""


def train_as_member(cfg: DictConfig, overrides: Sequence[str], launch: Launch) -> None:
    """Train with a composed config, completed by that of the run which this process joins.

    Raises:
        ConfigError: If the config is refused, or is not that of the run.
        RunStopped: If this process has left, or the run has stopped.
        GroupError: If the run has failed, or gone on without this process.
    """
    allowed = "false under torchrun, which ends all its processes with the first that is lost; "
    allowed += "`python -m consensus.elastic` starts members"
    require(launch.size == 1, "group.elastic", "true", allowed)
    allowed = "with MASTER_ADDR and MASTER_PORT of a store, as `python -m consensus.elastic` sets"
    known = {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    require(known, "group.elastic", "true", allowed)
    store = connect_to_launcher(timedelta(seconds=min(MEET_S, float(cfg.group.timeout_s))))
    config = _agreed_config(cfg, overrides, store)
    set_determinism(config)
    with machine_failures():
        try:
            plan = make_plan(config, launch)
        except (MachineError, SampleError) as error:
            raise ConfigError(str(error)) from error
        if plan.device.type == "cuda":
            torch.cuda.set_device(plan.device)
        how = config.group
        if config.output.tensorboard:  # it takes a second, which a run that has lost its first
            with suppress(ImportError):  # member would wait for
                importlib.import_module("torch.utils.tensorboard")
        members = Members.of_launcher(
            store,
            workers=how.workers_per_process,
            least=how.min_workers,
            timeout_s=how.timeout_s,
        )
        run_as_member(plan, members)


def _agreed_config(cfg: DictConfig, overrides: Sequence[str], store: Store) -> Config:
    """The config of the run, which is that of the first process."""
    before = _config_of(store)
    if before is None:
        config = to_config(cfg, overrides)
        text = to_text(config)
        store.compare_set("config", "", text)
        before = _config_of(store)
        assert before is not None
        if before == parse_config(text):
            return config
    own = {key: OmegaConf.select(cfg, key) for key in OWN}
    cfg = completed(cfg, overrides, before, {"group.elastic"})
    for key, value in own.items():
        OmegaConf.update(cfg, key, value)
    config = to_config(cfg, overrides)
    require_same(before, config, "the run that this process joins")
    return config


def _config_of(store: Store) -> dict[Any, Any] | None:
    """The config that the first process has given, as plain data."""
    if not (text := read_text(store, "config")):
        return None
    return parse_config(text)


def run_as_member(plan: Plan, members: Members) -> None:
    """Train as one of the members of a run, from the first view that has this process to the end.

    Raises:
        RunStopped: If this process has left, or the run has stopped.
        GroupError: If the run has failed, or gone on without this process.
    """
    signals = StopSignals(plan.config.group.timeout_s)
    trainer: ElasticTrainer | None = None
    finished = tried = False
    try:
        view = _join(members, signals)
        plan = _begun(plan, members)
        noticed = agreed = time.time()
        while not finished:
            if members.name not in view.members:
                done = "" if trainer is None else f" at iteration {trainer.at[0]:,}"
                again = "the same command joins it again"
                raise RunStopped(f"SIGTERM: left the run{done}; {again}", TRY_AGAIN)
            group: Group | None = None
            ready = PLANNED
            try:
                group = _open(plan, members)
                times = noticed, agreed
                trainer, tried = _enter(plan, group, members, signals, trainer, times, tried), True
                if view.stop:
                    trainer.end(view.stop)
                finished = trainer.train_in_view()
            except PeerLostError:
                ready, tried = LOST, tried or group is not None
            except GroupError:
                if trainer is not None:
                    trainer.finish_writing()  # a checkpoint from before the failure is valid
                raise
            noticed = time.time()
            if not finished:
                if trainer is not None and ready == PLANNED:
                    trainer.finish_writing()  # a checkpoint is written by the same members
                try:
                    view = members.change(LEAVING if members.leaving else ready)
                except StoreLostError as error:
                    if ready == PLANNED and trainer is not None:
                        trainer.end(str(error))  # the members are together as before
                    raise
                agreed = time.time()
            else:
                members.await_end()
            if group is not None:
                group.close()
        assert trainer is not None
        if trainer.group.rank == 0:
            trainer.tell_results()
    except RunStopped as stopped:
        if trainer is not None and trainer.group.rank > 0 and members.name in view.members:
            raise RunStopped("", stopped.code) from stopped  # the first member has the words
        raise
    finally:
        if trainer is not None:
            trainer.screen.__exit__()
            trainer.close()
        signals.close()
        with suppress(RuntimeError):  # the launcher is gone, and the store with it
            members.close(finished=finished)


def _join(members: Members, signals: StopSignals) -> View:
    """The first view that has this process; RunStopped if a signal comes before."""
    try:
        return members.join(lambda: signals.received != 0)
    except GroupError as error:
        if signals.received:
            raise RunStopped(str(error), TRY_AGAIN) from error
        raise


def _begun(plan: Plan, members: Members) -> Plan:
    """A plan that continues the run of this store, if that has lost all its members."""
    run_dir, view = read_text(members.store, "run_dir"), members.view
    if not run_dir or view is None or view.new != view.members:
        return plan
    config = replace(plan.config, resume="auto")
    config.output = replace(config.output, run_dir=run_dir)
    return replace(plan, config=config)


def _open(plan: Plan, members: Members) -> Group:
    """The group of the current view."""
    how = plan.config.group
    shared, tree = how.shared_memory, plan.config.deterministic
    return open_view(members, plan.device, how.timeout_s, shared_memory=shared, tree=tree)


def _enter(
    plan: Plan,
    group: Group,
    members: Members,
    signals: StopSignals,
    trainer: ElasticTrainer | None,
    times: tuple[float, float],
    tried: bool,
) -> ElasticTrainer:
    """The trainer of this process in a view: a new one, or that of the view before.

    `tried`: this process has begun the run before, and lost a member at once.
    """
    if trainer is not None:
        trainer.noticed, trainer.agreed = times
    known = group.gather_objects(tried if trainer is None else trainer.report())
    reports = [None if isinstance(found, bool) else found for found in known]
    own = plan_in_view(plan, members)
    if any(report is not None for report in reports):
        if trainer is None:
            trainer = ElasticTrainer(
                own, Solo(plan.device), members, signals, directory=JoinedDirectory()
            )
        trainer.adopt(own, group, reports)
        return trainer
    config = replace(plan.config)
    if any(known) and config.output.run_dir is not None:
        config.resume = "auto"  # some files of the first attempt are there
    origin = find_origin(config, Launch(), own.num_workers)
    trainer = ElasticTrainer(replace(own, origin=origin), group, members, signals)
    try:
        trainer.open()
    except BaseException:
        trainer.screen.__exit__()
        trainer.close()
        raise
    return trainer


def plan_in_view(plan: Plan, members: Members) -> Plan:
    """The plan of this process as one of the members of a view."""
    view = members.view
    assert view is not None
    rank, size = members.rank, len(view.members)
    for source, j in zip(plan.oracle.minibatches, view.workers[rank], strict=True):
        if source.worker != j:
            source.assign(j)
    launch = replace(plan.launch, rank=rank, size=size)
    count = len(view.numbers)
    sizes = (plan.shard_sizes[0],) * count
    return replace(plan, launch=launch, num_workers=count, members=view.numbers, shard_sizes=sizes)
