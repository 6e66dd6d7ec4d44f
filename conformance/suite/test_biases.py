from conformance.checks import biases
from conformance.suite.properties import as_test

test_optional = as_test(biases.optional)
test_forward = as_test(biases.forward)
