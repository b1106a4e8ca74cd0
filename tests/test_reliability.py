"""docs/reliability.md: a pure function of the promises' text and of what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reliability import MATRIX, PAGE, RESULTS, outcomes, read, render, sections

TESTS = '''
"""Saving: what is written stays."""
import pytest

def test_whole(record_property):
    """A file | is whole."""

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a", "b"])
def test_kinds(kind, record_property):
    """Every kind
    comes back."""

@pytest.mark.gpu
def test_fast_there():
    """It is fast there."""

def test_never_run():
    """It holds."""
'''
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.trust.test_saving" name="test_whole" time="0.25"/>
<testcase classname="tests.trust.test_saving" name="test_kinds[a]" time="1.0"><properties>
<property name="figure" value="gap 1e-9"/></properties></testcase>
<testcase classname="tests.trust.test_saving" name="test_kinds[b]" time="1.0"><properties>
<property name="figure" value="gap 2e-9"/></properties></testcase>
</testsuite></testsuites>"""
FAILED = JUNIT.replace('time="0.25"/>', 'time="0.25"><failure/></testcase>')


@pytest.fixture
def promised(tmp_path):
    (tmp_path / "test_saving.py").write_text(TESTS)
    return sections(tmp_path)


def page(promised, junit, folder: Path, **more):
    (folder / "junit.xml").write_text(junit)
    return render(promised, {"tests": outcomes(folder / "junit.xml"), **more}, {})


def test_a_promise_stands_beside_what_its_test_measured(promised, tmp_path):
    text = page(promised, JUNIT, tmp_path)
    assert "## Saving: what is written stays\n" in text
    assert "4 promises, 2 kept in the last run." in text
    assert "| A file \\| is whole | kept |" in text
    assert "| Every kind comes back (slow) | a: gap 1e-9; b: gap 2e-9 |" in text
    assert "| It is fast there | **not run: needs a GPU** |" in text
    assert "| It holds | **not run** |" in text


def test_a_broken_promise_says_so(promised, tmp_path):
    text = page(promised, FAILED, tmp_path)
    assert "4 promises, 1 kept in the last run." in text
    assert "| A file \\| is whole | **broken** |" in text


def test_versions_coverage_and_mutants_are_told(promised, tmp_path):
    matrix = {
        "environments": [{"name": "oldest", "versions": {"torch": "2.4"}, "passed": 9, "failed": 1, "skipped": 0}]
    }
    text = render(
        promised, {"coverage": {"lines": 0.975, "branches": 0.5}, "mutants": {"killed": 9, "survived": 1}}, matrix
    )
    assert "| oldest | torch 2.4 | 9 | 1 | 0 |" in text
    assert "97.5% of lines, 50.0% of branches" in text
    assert "9 of 10 mutants killed (90.0%)" in text


def test_a_test_that_promises_nothing_is_refused(tmp_path):
    (tmp_path / "test_saving.py").write_text(TESTS + "\ndef test_silent():\n    pass\n")
    with pytest.raises(ValueError, match=r"no docstring in \['test_silent'\]"):
        sections(tmp_path)


def test_the_page_is_that_of_the_tests_and_results_that_are_here():
    assert PAGE.read_text("utf-8") == render(sections(), read(RESULTS), read(MATRIX)), (
        "run python -m benchmarks.reliability"
    )
