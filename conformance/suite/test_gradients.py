from conformance.checks import gradients, twice
from conformance.suite.properties import as_test

test_parameters = as_test(gradients.parameters)
test_patched_default = as_test(gradients.patched_default)
test_patched_exact = as_test(gradients.patched_exact)
test_full_backward_hooks = as_test(gradients.full_backward_hooks)
test_everywhere = as_test(gradients.everywhere)
test_twice = as_test(twice.twice)
