from conformance.checks import parameters
from conformance.suite.properties import as_test

test_same = as_test(parameters.same)
test_cast = as_test(parameters.cast)
