from conformance.checks import metamorphic, symmetries
from conformance.suite.properties import as_test

test_causality = as_test(metamorphic.causality)
test_rows = as_test(metamorphic.rows)
test_padding = as_test(metamorphic.padding)
test_positions = as_test(metamorphic.positions)
test_history = as_test(metamorphic.history)
test_identity = as_test(metamorphic.identity)
test_scaling = as_test(symmetries.scaling)
test_units = as_test(symmetries.units)
test_groups = as_test(symmetries.groups)
test_vocabulary = as_test(symmetries.vocabulary)
test_neutral = as_test(symmetries.neutral)
