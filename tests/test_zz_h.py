import time, os, signal, concurrent.futures
from test_ipc import *
def test_h(private_world, tmp_path, peer):
    allowed, canary = peer("echo"), Canary(peer)
    (tmp_path / "passwords").write_text(f"alice:{hash_with('-1', 'wonderland')}\n")
    only = f"from: 0/0 to: 127.0.0.1/32 port = {allowed.port}"
    config = (
        HEAD.replace("socksmethod: none", "socksmethod: username none")
        + f"passwordfile: {tmp_path}/passwords\nlogin.penalty: no\n"
        + rule("client pass", "from: 0/0 to: 0/0")
        + rule("socks pass", only)
        + rule("socks pass", "from: 0/0 to: 0/0", "command: udpassociate")
    )
    server = Sockd(config, tmp_path, world=private_world)
    good = originals(allowed.port, canary)
    slow=[]
    t0=time.time()
    for seed in range(1500):
        m,c = make_handshake(seed, good)
        t=time.time()
        shake_hands(server, m, c)
        d=time.time()-t
        slow.append((d,seed,m[:60].hex(' ')))
    print("total",time.time()-t0)
    slow.sort(reverse=True)
    for s in slow[:25]: print(s)
    time.sleep(1)
    server.signal(signal.SIGUSR1); time.sleep(1)
    print(server.find_excess())
    print(server.text[-3000:])
    server.kill()
    assert 0
