"""Apache Kafka, one node without ZooKeeper, from Maven Central.

python -m tests.servers.kafka    # fetches it, with mvn
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.servers.server import AbsentError, Place, Recipe

VERSION = "4.1.1"
USER = "shop"
PASSWORD = "guarded-7f3a"
"""What the third port asks for, behind TLS."""
PEM = "guarded.pem"
"""The file in the server's directory that holds the certificate of the third port, signed by nobody else."""
BEHIND, PROXY = 3, 4
"""How far behind its first port it listens for who comes through a proxy, and where it tells them the proxy is."""
JAVA_OPTIONS = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
CURE = (
    "no Kafka: with java (17 or newer), openssl and mvn run python -m tests.servers.kafka once, "
    "or name one in EVENTBUS_TEST_KAFKA"
)
POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>eventbus.tests</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-simple</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""
PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},GUARDED://127.0.0.1:{guarded},BEHIND://127.0.0.1:{behind}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},GUARDED://127.0.0.1:{guarded},BEHIND://127.0.0.1:{proxy}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,GUARDED:SASL_SSL,BEHIND:PLAINTEXT
listener.name.guarded.ssl.keystore.type=PEM
listener.name.guarded.ssl.keystore.location={pem}
listener.name.guarded.sasl.enabled.mechanisms=PLAIN
listener.name.guarded.plain.sasl.jaas.config={plain} required user_{user}="{password}";
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
"""
API_VERSIONS = b"\x00\x00\x00\x0a\x00\x12\x00\x00\x00\x00\x00\x01\xff\xff"


def jars() -> Path:
    """Return the folder where the jars are kept between sessions."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "eventbus-tests" / f"kafka-{VERSION}"


def fetch() -> None:
    """Fetch the jars unless they are there."""
    if jars().is_dir():
        return
    jars().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=jars().parent) as work:
        Path(work, "pom.xml").write_text(POM)
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory=jars"]
        subprocess.run(["mvn", "-B", "-q", *goal], cwd=work, check=True, stdin=subprocess.DEVNULL)
        Path(work, "jars").rename(jars())


def recipe() -> Recipe:
    """Return how Kafka runs: on ports for clients, its controller, clients that log in, and those behind a proxy."""
    java, openssl = shutil.which("java"), shutil.which("openssl")
    if java is None or openssl is None or not jars().is_dir():
        raise AbsentError(CURE)

    def run(main: str, *arguments: str) -> list[str]:
        return [java, *JAVA_OPTIONS, "-cp", f"{jars()}/*", main, *arguments]

    def prepare(place: Place) -> list[list[str]]:
        text = PROPERTIES.format(
            port=place.port, controller=place.port + 1, guarded=place.port + 2,
            behind=place.port + BEHIND, proxy=place.port + PROXY, data=place.directory / "data",
            plain="org.apache.kafka.common.security.plain.PlainLoginModule", user=USER,
            password=PASSWORD, pem=place.directory / PEM,
        )  # fmt: skip
        (place.directory / "server.properties").write_text(text)
        cluster = ["-t", "ZXZlbnRidXMtdGVzdHMwMQ", "-c", "server.properties"]
        certificate = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", PEM, "-out", PEM]
        certificate += ["-days", "30", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        return [certificate, run("kafka.tools.StorageTool", "format", *cluster)]

    return Recipe(
        name="kafka",
        url="kafka://127.0.0.1:{port}",
        prepare=prepare,
        command=lambda place: run("kafka.Kafka", "server.properties"),
        hello=API_VERSIONS,
        answer=rb"....\x00\x00\x00\x01",
        ports=5,
    )


if __name__ == "__main__":
    fetch()
    print(jars())
