"""Threads and dtype that suit the machine."""

import os

import pytest
import torch

from loralloc.runs import machine


@pytest.fixture
def threads(monkeypatch):
    """What PyTorch was told, without telling it."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return told


@pytest.mark.parametrize(("physical", "allowed", "expected"), [(4, 8, 4), (64, 2, 2)])
def test_a_thread_a_core_that_may_be_used(physical, allowed, expected, threads, monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: physical)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    machine.use_physical_cores()
    assert threads == [expected]


def test_the_users_own_number_stays(threads, monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.use_physical_cores() == torch.get_num_threads()
    assert threads == []


def test_where_cores_cannot_be_told_pytorch_decides(threads, monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: None)
    machine.use_physical_cores()
    assert threads == []
