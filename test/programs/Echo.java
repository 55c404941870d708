// SPDX-License-Identifier: Apache-2.0
// `Echo server ADDRESS PORT` sends back what it receives, all connections in one Selector. `Echo client ADDRESS PORT`
// has eight connections, compares every byte that comes back, and goes on until its input ends.

import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.util.*;

public class Echo {
    static final int CONNECTIONS = 8;

    public static void main(String[] words) throws Exception {
        InetSocketAddress address = new InetSocketAddress(words[1], Integer.parseInt(words[2]));
        if (words[0].equals("server")) {
            serve(address);
        } else {
            ask(address);
        }
    }

    static void serve(InetSocketAddress address) throws IOException {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open().bind(address);
        listener.configureBlocking(false).register(selector, SelectionKey.OP_ACCEPT);
        while (true) {
            selector.select();
            for (SelectionKey key : drain(selector)) {
                if (key.isAcceptable()) {
                    SelectableChannel accepted = listener.accept().configureBlocking(false);
                    accepted.register(selector, SelectionKey.OP_READ, ByteBuffer.allocateDirect(65536));
                    continue;
                }
                SocketChannel channel = (SocketChannel) key.channel();
                ByteBuffer buffer = (ByteBuffer) key.attachment();
                if (channel.read(buffer) < 0) {
                    channel.close();
                    continue;
                }
                buffer.flip();
                channel.write(buffer);
                buffer.compact();
                // Only room for more, or only bytes to send, are worth waking for.
                key.interestOps((buffer.hasRemaining() ? SelectionKey.OP_READ : 0)
                        | (buffer.position() > 0 ? SelectionKey.OP_WRITE : 0));
            }
        }
    }

    /** What one connection sends, and what must come back. */
    static class Conversation {
        final Random sent, expected;
        final ByteBuffer out = ByteBuffer.allocate(40000).limit(0);
        long sentBytes, receivedBytes;

        Conversation(long seed) {
            sent = new Random(seed);
            expected = new Random(seed);
        }
    }

    static void ask(InetSocketAddress address) throws Exception {
        Selector selector = Selector.open();
        List<Conversation> conversations = new ArrayList<>();
        for (int number = 0; number < CONNECTIONS; number++) {
            SocketChannel channel = SocketChannel.open(address);
            Conversation conversation = new Conversation(number);
            conversations.add(conversation);
            int both = SelectionKey.OP_READ | SelectionKey.OP_WRITE;
            channel.configureBlocking(false).register(selector, both, conversation);
        }
        Thread input = new Thread(() -> {
            try {
                System.in.readAllBytes();
            } catch (IOException error) {
                throw new RuntimeException(error);
            }
            selector.wakeup();
        });
        input.start();
        ByteBuffer in = ByteBuffer.allocateDirect(65536);
        for (int open = CONNECTIONS; open > 0;) {
            selector.select();
            for (SelectionKey key : drain(selector)) {
                SocketChannel channel = (SocketChannel) key.channel();
                Conversation conversation = (Conversation) key.attachment();
                if (key.isReadable()) {
                    receive(channel, conversation, in.clear());
                }
                if (input.isAlive() || conversation.out.hasRemaining()) {
                    send(channel, conversation);
                } else if (conversation.sentBytes == conversation.receivedBytes) {
                    channel.close();
                    open--;
                } else {
                    key.interestOps(SelectionKey.OP_READ);
                }
            }
        }
        long sent = conversations.stream().mapToLong(conversation -> conversation.sentBytes).sum();
        long received = conversations.stream().mapToLong(conversation -> conversation.receivedBytes).sum();
        System.out.printf("{\"connections\": %d, \"sent\": %d, \"received\": %d}%n", CONNECTIONS, sent, received);
    }

    static void send(SocketChannel channel, Conversation conversation) throws IOException {
        ByteBuffer out = conversation.out;
        if (!out.hasRemaining()) {
            out.clear();
            while (out.hasRemaining()) {
                out.put((byte) conversation.sent.nextInt());
            }
            out.flip();
        }
        conversation.sentBytes += channel.write(out);
    }

    static void receive(SocketChannel channel, Conversation conversation, ByteBuffer in) throws IOException {
        if (channel.read(in) < 0) {
            throw new IOException("end of file after " + conversation.receivedBytes + " bytes");
        }
        for (in.flip(); in.hasRemaining(); conversation.receivedBytes++) {
            byte expected = (byte) conversation.expected.nextInt(), received = in.get();
            if (expected != received) {
                throw new IOException("byte " + conversation.receivedBytes + " is " + received
                        + ", expected " + expected);
            }
        }
    }

    static List<SelectionKey> drain(Selector selector) {
        List<SelectionKey> keys = new ArrayList<>(selector.selectedKeys());
        selector.selectedKeys().clear();
        return keys;
    }
}
