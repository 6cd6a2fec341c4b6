"""What commands do their work with; each is loaded when a command first needs it, so that --help waits for none."""

from typing import TYPE_CHECKING

from celora.lazy import Lazy

if TYPE_CHECKING:
    from celora import catalog, experiment
    from celora.cli import output
    from celora.experiment import client, exports, server
    from celora.privacy import keys
    from celora.site import certificates, check, ledger
else:
    catalog, experiment, output = Lazy("celora.catalog"), Lazy("celora.experiment"), Lazy("celora.cli.output")
    exports = Lazy("celora.experiment.exports")
    client, certificates = Lazy("celora.experiment.client"), Lazy("celora.site.certificates")  # with extras
    server, keys = Lazy("celora.experiment.server"), Lazy("celora.privacy.keys")
    check, ledger = Lazy("celora.site.check"), Lazy("celora.site.ledger")


__all__ = ["catalog", "certificates", "check", "client", "experiment", "exports", "keys", "ledger", "output", "server"]
