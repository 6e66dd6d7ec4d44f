from conformance.checks import outlived, surface
from conformance.suite.properties import as_test

test_constructor = as_test(surface.constructor)
test_methods = as_test(surface.methods)
test_optional_parameters = as_test(surface.optional_parameters)
test_entrances = as_test(surface.entrances)
test_nothing_kept = as_test(outlived.nothing_kept)
