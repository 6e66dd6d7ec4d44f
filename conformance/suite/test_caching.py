from conformance.checks import cached_gradients, caching, caching_hooks, partial_runs
from conformance.suite.properties import as_test

test_values = as_test(caching.values)
test_unchanging = as_test(caching.unchanging)
test_incl_bwd = as_test(cached_gradients.incl_bwd)
test_layers = as_test(partial_runs.layers)
test_hooks = as_test(caching_hooks.caching_hooks)
