"""In a checkout that is not installed, pytest still needs the kit's plugin."""

from importlib.metadata import entry_points

installed = {point.value for point in entry_points(group="pytest11")}
pytest_plugins = [] if "conformance.plugin" in installed else ["conformance.plugin"]
