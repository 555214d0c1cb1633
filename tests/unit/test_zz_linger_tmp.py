import asyncio, subprocess, threading, socket, time
import pytest
KEEP=[]
async def test_ok(): await asyncio.sleep(0)
async def test_task():
    KEEP.append(asyncio.create_task(asyncio.sleep(30)))
def test_run_task():
    async def main(): KEEP.append(asyncio.create_task(asyncio.sleep(30)))
    asyncio.run(main())
def test_thread():
    t=threading.Thread(target=time.sleep,args=(5,),name="mine"); t.start()
def test_process():
    KEEP.append(subprocess.Popen(["sleep","30"]))
def test_orphan():
    subprocess.run(["sh","-c","sleep 31 & exit"])
def test_sock():
    KEEP.append(socket.socket())
def test_fails():
    KEEP.append(socket.socket()); assert 0
