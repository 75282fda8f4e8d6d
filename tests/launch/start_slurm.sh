#!/usr/bin/env bash
# A real Slurm on one machine, as root: nodes n1 (two pretended A100s) and n2 (two pretended H100s), partitions main and urgent.
# May be run again at any time: it starts what does not run. `start_slurm.sh stop` ends all of it.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root: it installs packages, makes devices and names in /etc/hosts" >&2; exit 1; }

if [ -e /etc/slurm/slurm.conf ] && ! grep -qs fakegpu /etc/slurm/gres.conf; then
  echo "this machine has a Slurm of its own in /etc/slurm" >&2; exit 1
fi
if [ "${1:-}" = stop ]; then
  for name in slurmd-n1 slurmd-n2 slurmctld slurmdbd; do kill "$(cat /run/$name.pid 2>/dev/null)" 2>/dev/null || true; done
  mariadb-admin shutdown 2>/dev/null || true
  kill "$(cat /run/munge/munged.pid 2>/dev/null)" 2>/dev/null || true
  exit 0
fi

command -v slurmdbd >/dev/null && command -v slurmctld >/dev/null && command -v mariadbd >/dev/null ||
  bash "$(dirname "$0")/../apt_install.sh" slurm-wlm munge slurmdbd mariadb-server
host=$(hostname -s)

grep -qE '^127\.0\.0\.1 n1 n2$' /etc/hosts || echo '127.0.0.1 n1 n2' >> /etc/hosts  # the head node is called by its name
for n in n1 n2; do for i in 0 1; do [ -e /dev/fakegpu-$n-$i ] || mknod -m 666 /dev/fakegpu-$n-$i c 1 3; done; done
mkdir -p /etc/slurm /var/log/slurm /var/spool/slurmctld /var/spool/slurmd-n1 /var/spool/slurmd-n2 /run/munge /run/mysqld
chown munge:munge /run/munge; chown mysql:mysql /run/mysqld

cat > /etc/slurm/slurm.conf <<E
ClusterName=ci
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmctldParameters=preempt_send_user_signal
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobAcctGatherFrequency=0
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=3600
KillWait=3
ReturnToService=2
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=5
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=4 RealMemory=4000 Gres=gpu:a100:2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=4 RealMemory=4000 Gres=gpu:h100:2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
E
cat > /etc/slurm/gres.conf <<'E'
NodeName=n1 Name=gpu Type=a100 File=/dev/fakegpu-n1-[0-1]
NodeName=n2 Name=gpu Type=h100 File=/dev/fakegpu-n2-[0-1]
E
echo 'CgroupPlugin=cgroup/v1' > /etc/slurm/cgroup.conf
cat > /etc/slurm/slurmdbd.conf <<'E'
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
LogFile=/var/log/slurm/slurmdbd.log
PidFile=/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=ci
StorageLoc=slurm_acct_db
E
chmod 600 /etc/slurm/slurmdbd.conf

wait_for() {
  for _ in $(seq 100); do timeout 5 "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done
  echo "timed out: $*" >&2; return 1
}
munge -n 2>/dev/null | unmunge >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged </dev/null >/dev/null 2>&1
wait_for bash -c 'munge -n | unmunge'
[ -d /var/lib/mysql/mysql ] || mariadb-install-db --user=mysql --datadir=/var/lib/mysql >/dev/null
if ! timeout 5 mariadb-admin ping >/dev/null 2>&1; then
  # a plain command with redirections of its own: `A || B &` would leave a shell that holds the caller's output for ever
  setsid mariadbd --user=mysql --skip-networking --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
    </dev/null >/var/log/slurm/mariadb.log 2>&1 &
fi
wait_for mariadb-admin ping
timeout 10 mariadb -e "create database if not exists slurm_acct_db; \
  create user if not exists 'slurm'@'localhost' identified by 'ci'; grant all on slurm_acct_db.* to 'slurm'@'localhost'"
timeout 5 sacctmgr -n show cluster >/dev/null 2>&1 || slurmdbd </dev/null >/dev/null 2>&1
wait_for sacctmgr -n show cluster
timeout 5 sacctmgr -n show cluster | grep -qw ci || timeout 10 sacctmgr -i add cluster ci >/dev/null
timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP' || slurmctld </dev/null >/dev/null 2>&1
for n in n1 n2; do
  kill -0 "$(cat /run/slurmd-$n.pid 2>/dev/null)" 2>/dev/null || slurmd -N $n </dev/null >/dev/null 2>&1
done
wait_for bash -c '[ "$(sinfo -h -N -p main -t idle,mix,alloc -o %N | sort -u | wc -l)" = 2 ]'
timeout 5 sinfo -N -p main -o '%N %t %c %G'
