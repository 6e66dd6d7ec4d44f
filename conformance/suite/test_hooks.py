from conformance.checks import hooks
from conformance.suite.properties import as_test

test_values = as_test(hooks.values)
test_gradients = as_test(hooks.gradients)
test_names = as_test(hooks.names)
