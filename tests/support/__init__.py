"""What tests of several folders share: real MLflow servers, a faulty network in front of them."""

from tests.support.proxy import TcpProxy
from tests.support.servers import MlflowServer

__all__ = ["MlflowServer", "TcpProxy"]
