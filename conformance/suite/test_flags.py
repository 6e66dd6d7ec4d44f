from conformance.checks import flag_states, flags
from conformance.suite.properties import as_test

test_unchanged = as_test(flags.unchanged)
test_hooks = as_test(flags.hooks)
test_edits = as_test(flags.edited)
test_in_place = as_test(flags.in_place)
test_refused = as_test(flag_states.refused)
test_copies = as_test(flag_states.copies)
test_compatibility = as_test(flag_states.compatibility)
