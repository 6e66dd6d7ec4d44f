from conformance.checks import batchless, interventions, layouts
from conformance.suite.properties import as_test

test_returned = as_test(interventions.returned)
test_patching = as_test(interventions.patching)
test_in_place = as_test(interventions.in_place)
test_clipped = as_test(interventions.clipped)
test_layouts = as_test(layouts.layouts)
test_batchless = as_test(batchless.batchless)
