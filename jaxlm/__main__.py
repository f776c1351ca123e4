"""python -m jaxlm COMMAND."""
from jaxlm.cli import main

main()
