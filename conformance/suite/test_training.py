from conformance.checks import training
from conformance.suite.properties import as_test

test_steps = as_test(training.steps)
test_accumulation = as_test(training.accumulation)
