"""Get at the parser of a script, to inspect its flags, defaults and choices."""

import importlib

import pytest

import utils

# Where a script's command line is, if not in itself.
COMMAND_LINES = {"masks": "report.mask_command_line"}


def parser_of(module, arguments=()):
    """The parser that `parse_args` of a module builds, caught just before it parses."""
    caught = []

    class Caught(Exception):
        pass

    def catch(self, *args, **kwargs):
        caught.append(self)
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.ArgumentParser, "parse_args", catch)
        patch.setattr(utils.ArgumentParser, "parse_known_args", catch)
        with pytest.raises(Caught):
            importlib.import_module(COMMAND_LINES.get(module, module)).parse_args([*arguments])

    return caught[0]
