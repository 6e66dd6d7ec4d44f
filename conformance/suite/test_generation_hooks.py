from conformance.checks import generation_hooks
from conformance.suite.properties import as_test

test_hooks = as_test(generation_hooks.hooks)
test_leaves_nothing = as_test(generation_hooks.leaves_nothing)
