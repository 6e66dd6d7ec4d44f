from conformance.checks import hook_api, hook_errors, hook_order, kept, lookup, torch_hooks
from conformance.suite.properties import as_test

test_ledger = as_test(hook_api.ledger)
test_exceptions = as_test(hook_errors.exceptions)
test_order = as_test(hook_order.order)
test_contexts = as_test(hook_order.contexts)
test_lookup = as_test(lookup.lookup)
test_components = as_test(lookup.components)
test_kept = as_test(kept.kept)
test_nested = as_test(kept.nested)
test_torch = as_test(torch_hooks.torch_hooks)
