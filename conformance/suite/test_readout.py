from conformance.checks import readout
from conformance.suite.properties import as_test

test_layers = as_test(readout.layers)
test_attribution = as_test(readout.attribution)
test_processed = as_test(readout.processed)
