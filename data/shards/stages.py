"""A user's own stages of the stream: functions that take a sample and return one, named in `data.stages`.

    # my_stages.py, in the folder that training is started from
    from dataclasses import replace
    from data.shards.sample import Sample

    def softer(sample: Sample) -> Sample:
        return replace(sample, latent=sample.latent * 0.98)

    python -m train conf=wan_4x data.stages=[my_stages.softer]

A stage runs in the loader's threads, in several of them at once. What it returns has to depend on the sample alone:
then a resumed run, and the ranks that share a clip, get the same. Chance comes from the sample's key, for example
`random.Random(sample.key)`.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.shards.sample import Sample


@dataclass(frozen=True)
class Stage:
    """A function of a user's, held to the schema.

    Attributes:
        name: `package.module.function`, as the config has it.
        function: takes a `Sample` and returns one with the same key and the same shape of its latent.
    """

    name: str
    function: Callable[[Sample], Sample]

    def __call__(self, sample: Sample) -> Sample:
        """The sample that the function makes of this one.

        Raises:
            DataError: naming the stage and the sample: the function raised, or what it returned does not fit.
        """
        key, shape = sample.key, tuple(sample.latent.shape)
        where = f"data.stages: {self.name} of sample {key}"
        try:
            found = self.function(sample)
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            place = f"{Path(last.filename).name}, line {last.lineno}"
            raise DataError(f"{where}: raised {type(error).__name__}: {error} ({place}); correct the stage") from error
        if not isinstance(found, Sample):
            raise DataError(f"{where}: returned {type(found).__name__}, expected a data.shards.sample.Sample")
        if found.key != key:
            raise DataError(f"{where}: changed the key to {found.key!r}, expected the same key")
        try:
            found.validate()
        except (DataError, AttributeError, TypeError) as error:  # the fields may hold anything
            raise DataError(f"{where}: returned what is no valid sample: {error}") from error
        # The order of batches and the plan of memory and time were made for the manifest's shapes.
        if tuple(found.latent.shape) != shape:
            raise DataError(
                f"{where}: changed the latent's shape from {list(shape)} to {list(found.latent.shape)}, expected the "
                "same shape; make shards of other shapes with data.prepare"
            )
        return found


def load_stages(names: Sequence[str]) -> tuple[Stage, ...]:
    """The stages of these names, in this order.

    Args:
        names: each `package.module.function`, importable from the working directory or from what is installed.

    Raises:
        DataError: naming the stage: it is no such name, its module cannot be imported, or it has no such function.
    """
    return tuple(_load(name) for name in names)


def _load(name: str) -> Stage:
    where = f"data.stages: {name}"
    expected = "expected package.module.function, importable from the working directory"
    module_name, _, function_name = name.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in name.split(".")):
        raise DataError(f"{where}: is not the name of a function in a module, {expected}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise DataError(f"{where}: cannot be imported ({type(error).__name__}: {error}); {expected}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "has no such function" if function is None else f"is a {type(function).__name__}, not a function"
        raise DataError(f"{where}: {module_name} {'' if function is None else function_name + ' '}{found}; {expected}")
    return Stage(name, function)
