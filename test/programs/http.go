// SPDX-License-Identifier: Apache-2.0

// `http server ADDRESS` answers each POST with its body and the SHA-256 of it, and GET /connections with how many it
// has accepted. `http client ADDRESS` keeps eight connections alive, compares every answer, and goes on until its
// input ends.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
)

const connections = 8

func main() {
	if os.Args[1] == "server" {
		serve(os.Args[2])
	} else {
		load("http://" + os.Args[2])
	}
}

func serve(address string) {
	var accepted int64
	server := http.Server{Addr: address, ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			atomic.AddInt64(&accepted, 1)
		}
	}}
	http.HandleFunc("/connections", func(response http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(response, atomic.LoadInt64(&accepted))
	})
	http.HandleFunc("/", func(response http.ResponseWriter, request *http.Request) {
		body, err := io.ReadAll(request.Body)
		if err != nil {
			log.Fatal(err)
		}
		digest := sha256.Sum256(body)
		response.Write(append(body, digest[:]...))
	})
	log.Fatal(server.ListenAndServe())
}

func load(url string) {
	transport := &http.Transport{MaxConnsPerHost: connections, MaxIdleConnsPerHost: connections}
	client := &http.Client{Transport: transport}
	ended := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	var requests int64
	var all sync.WaitGroup
	for number := int64(0); number < connections; number++ {
		chance := rand.New(rand.NewSource(number))
		all.Add(1)
		go func() {
			defer all.Done()
			for {
				select {
				case <-ended:
					return
				default:
				}
				body := make([]byte, chance.Intn(200000))
				chance.Read(body)
				digest := sha256.Sum256(body)
				answer := post(client, url, body)
				if !bytes.Equal(answer, append(body, digest[:]...)) {
					log.Fatalf("an answer of %d bytes to %d is wrong", len(answer), len(body))
				}
				atomic.AddInt64(&requests, 1)
			}
		}()
	}
	all.Wait()
	response, err := client.Get(url + "/connections")
	fmt.Printf("{\"connections\": %s, \"requests\": %d}\n", read(response, err), requests)
}

func post(client *http.Client, url string, body []byte) []byte {
	// Of a type that net/http cannot repeat by itself: an error is seen.
	response, err := client.Post(url, "application/octet-stream", io.MultiReader(bytes.NewReader(body)))
	return read(response, err)
}

func read(response *http.Response, err error) []byte {
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	return answer
}
