#!/bin/busybox sh
# The machine's first process: two RDMA devices, the host's checkout where the host has it, then the command.
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LANG=C.UTF-8 TMPDIR=/tmp

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
# The kernel says of its first file system that it has no room, and a NATS server believes that.
mount -t tmpfs -o size=16g tmp /tmp
mount -t devpts pts /dev/pts
ln -s /proc/self/fd /dev/fd
chmod 1777 /tmp /dev/shm
while read -r module; do
  insmod "/modules/$module" || echo "init: cannot load $module"
done </modules/order

end() { # end STATUS: the host reads it from the second port; `begun` before it when the machine was ready
  echo "$1" >/dev/vport0p2
  sync
  echo o >/proc/sysrq-trigger
  sleep 60
}

# What to run, and where, comes from the host: CHECKOUT, PYTHON (where its interpreter is installed), and run().
. /sys/firmware/qemu_fw_cfg/by_name/opt/computemesh/raw || end 125
mkdir -p "$CHECKOUT" "${PYTHON%/*}"
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose checkout "$CHECKOUT" || end 125
[ -e "$PYTHON" ] || ln -s /usr "$PYTHON"

# Both ends of one cable, each with an address of its own and an RDMA device. Since both are this machine's, the kernel
# has to be told to send from one to the other: where they are, and that packets from its own addresses are welcome.
hostname rdma-vm
for interface in default all; do echo 0 >/proc/sys/net/ipv6/conf/$interface/accept_dad; done
/bin/ip -batch - <<'LINKS' || end 125
link set lo up
link add veth0 mtu 9000 address 02:77:00:00:00:01 type veth peer name veth1 mtu 9000 address 02:77:00:00:00:02
addr add 10.77.0.1/24 dev veth0
addr add 10.77.0.2/24 dev veth1
link set veth0 up
link set veth1 up
neigh replace 10.77.0.2 lladdr 02:77:00:00:00:02 dev veth0 nud permanent
neigh replace 10.77.0.1 lladdr 02:77:00:00:00:01 dev veth1 nud permanent
LINKS
for interface in all veth0 veth1; do
  echo 1 >/proc/sys/net/ipv4/conf/$interface/accept_local
  echo 0 >/proc/sys/net/ipv4/conf/$interface/rp_filter
done
for number in 0 1; do rdma link add rxe$number type rxe netdev veth$number || end 125; done

ulimit -l unlimited
ulimit -c 0
cd "$CHECKOUT" || end 125
echo begun >/dev/vport0p2
run </dev/null >/dev/vport0p1 2>&1
end $?
