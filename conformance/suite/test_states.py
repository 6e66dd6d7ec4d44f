from conformance.checks import states
from conformance.suite.properties import as_test

test_names = as_test(states.names)
test_loading = as_test(states.loading)
test_refused = as_test(states.refused)
