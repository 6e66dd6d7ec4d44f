from conformance.checks import compatibility
from conformance.suite.properties import as_test

test_log_probabilities = as_test(compatibility.log_probabilities)
test_value_biases = as_test(compatibility.value_biases)
test_refusal = as_test(compatibility.refusal)
test_hooks = as_test(compatibility.hooks)
test_trains = as_test(compatibility.trains)
test_frozen = as_test(compatibility.frozen)
