"""A relay between a browser and a server, which can lose what they say to each other."""

import contextlib
import socket
import threading


class Relay:
    """Hand on what two ends send each other, until it is told not to.

    Args:
        port: that of the server.

    Attributes:
        address: what a browser asks in the place of the server.
        reachable: False turns everybody away who comes.
    """

    def __init__(self, port: int) -> None:
        self.reachable = True
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._age = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self) -> None:
        """Hand on nothing any more on the connections that there are, and tell nobody."""
        self._age += 1

    def cut(self) -> None:
        """End the connections that there are."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):  # ended by itself
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                browser, _ = self._listener.accept()
                if not self.reachable:
                    browser.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [browser, server]
                for source, target in ((browser, server), (server, browser)):
                    arguments = (source, target, self._age)
                    threading.Thread(target=self._hand_on, args=arguments, daemon=True).start()

    def _hand_on(self, source: socket.socket, target: socket.socket, age: int) -> None:
        with contextlib.suppress(OSError):  # an end is gone
            while data := source.recv(65536):
                if age == self._age:
                    target.sendall(data)
            if age == self._age:
                target.shutdown(socket.SHUT_WR)
